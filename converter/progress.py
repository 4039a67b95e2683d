"""How far a conversion has come: a bar with the time left on a terminal, a line for every tenth elsewhere."""

import contextlib
import sys
import time
from collections.abc import Callable, Iterator

import click


@contextlib.contextmanager
def progress(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Report work of ``total`` units on standard error; yields a function to call with the units done since."""
    if sys.stderr.isatty():
        with click.progressbar(length=total, label=label, file=sys.stderr, show_eta=True) as bar:
            yield bar.update
    else:
        yield _lines(label, total)


def _lines(label: str, total: int) -> Callable[[int], None]:
    started = time.monotonic()
    done, tenths = 0, 0

    def update(units: int) -> None:
        nonlocal done, tenths
        done += units
        if done * 10 // total > tenths:
            tenths = done * 10 // total
            elapsed = time.monotonic() - started
            left = elapsed * (total - done) / done
            click.echo(f"{label}: {done * 100 // total} %, {elapsed:.0f} s, about {left:.0f} s left", err=True)

    return update
