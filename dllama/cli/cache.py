"""`dllama cache`: the slices of models that workers on this machine keep on disk."""

import json
import time
from collections.abc import Sequence

import click

from dllama.cli.info import table
from dllama.cli.report import visible
from dllama.cluster.slice_cache import Entry, SliceCache
from dllama.engine.memory import in_units
from dllama.errors import FileError

SHOWN_DIGITS = 12
DAY = 86400


@click.group()
def cache() -> None:
    """Show, clear and check the slices that workers keep.

    A worker keeps the slices that roots sent it, and the next start sends nothing. What has not been used for longest
    makes room for what is new; nothing has to be cleared by hand.

    \b
      dllama cache list
      dllama cache clear --older-than 30
      dllama cache verify
    """


@cache.command("list")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def list_slices(as_json) -> None:
    """List the slices.

    The one used last comes first. A slice in part is one whose transfer broke off; it goes on from there. A slice in
    use belongs to a worker that runs.
    """
    slices = SliceCache()
    entries = slices.entries()
    if as_json:
        values = {"folder": str(slices.folder), "slices": [_values(entry) for entry in entries]}
        click.echo(json.dumps(values, indent=2, ensure_ascii=False))
        return
    click.echo(f"{slices.folder}: {_count(entries)}, {in_units(sum(entry.file_bytes for entry in entries))}")
    if entries:
        rows = [(e.name[:SHOWN_DIGITS], in_units(e.file_bytes), _ago(e.used), _state(e)) for e in entries]
        lines = table([("slice", "on disk", "last used", "state"), *rows]).splitlines()
        labels = ["of", *(visible(entry.label) for entry in entries)]
        click.echo("\n" + "\n".join(f"{line}  {label}" for line, label in zip(lines, labels, strict=True)))


@cache.command()
@click.argument("names", nargs=-1, metavar="[SLICE]...")
@click.option("--older-than", type=click.FloatRange(min=0), metavar="DAYS", help="Only those not used for so long.")
def clear(names, older_than) -> None:
    """Remove slices.

    All of them, or those that are given by their first digits; but none that is in use.
    """
    slices = SliceCache()
    chosen = _named(slices, names) if names else None
    done = slices.clear(chosen and {entry.name for entry in chosen}, (older_than or 0) * DAY)
    left = f"; {done.busy} in use left" if done.busy else ""
    click.echo(f"{in_units(done.nbytes)} freed, {done.files} removed{left}")


@cache.command()
@click.argument("names", nargs=-1, metavar="[SLICE]...")
def verify(names) -> None:
    """Check slices for damage.

    All of them, or those that are given by their first digits, are read from the disk; each has to be as it came.
    """
    slices = SliceCache()
    entries = [entry for entry in (_named(slices, names) if names else slices.entries()) if entry.whole]
    damaged = []
    for entry in entries:
        bad = slices.verify(entry.name)
        name = entry.name[:SHOWN_DIGITS]
        click.echo(f"{name}  {f'damaged, chunks: {bad}' if bad else 'sound'}")
        damaged += [name] if bad else []
    if damaged:
        raise FileError(slices.folder, f"slices are damaged; dllama cache clear {' '.join(damaged)} removes them")


def _named(slices: SliceCache, names: Sequence[str]) -> list[Entry]:
    """The slices that begin with these digits. Raises FileError where there is none."""
    entries = slices.entries()
    for name in names:
        if not any(entry.name.startswith(name) for entry in entries):
            raise FileError(slices.folder, f"no slice {name}; dllama cache list shows what is there")
    return [entry for entry in entries if entry.name.startswith(tuple(names))]


def _values(entry: Entry) -> dict:
    return {
        "name": entry.name,
        "label": entry.label,
        "bytes": entry.nbytes,
        "done_bytes": entry.done_bytes,
        "file_bytes": entry.file_bytes,
        "used": entry.used,
        "whole": entry.whole,
        "busy": entry.busy,
    }


def _count(entries: Sequence[Entry]) -> str:
    return "1 slice" if len(entries) == 1 else f"{len(entries)} slices"


def _state(entry: Entry) -> str:
    part = "whole" if entry.whole else f"{100 * entry.done_bytes // max(1, entry.nbytes)} % of {in_units(entry.nbytes)}"
    return f"{part}, in use" if entry.busy else part


def _ago(then: float) -> str:
    seconds = max(0, time.time() - then)
    for unit, length in (("days", DAY), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit} ago"
    return "just now"
