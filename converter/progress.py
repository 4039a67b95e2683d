"""How far a conversion has come: a bar with the time left on a terminal, a few lines elsewhere."""

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
    """A line for every tenth of the work, but no two within a second."""
    started = time.monotonic()
    done, tenths, last = 0, 0, started

    def update(units: int) -> None:
        nonlocal done, tenths, last
        done += units
        now = time.monotonic()
        if done * 10 // total > tenths and (now - last >= 1 or done == total):
            tenths, last = done * 10 // total, now
            left = (now - started) * (total - done) / done
            click.echo(f"{label}: {done * 100 // total} %, {now - started:.0f} s, about {left:.0f} s left", err=True)

    return update
