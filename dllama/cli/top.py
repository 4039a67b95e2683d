"""`--top`: what each node does, in a table that is kept up to date below the text."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Sequence
from statistics import fmean
from typing import TYPE_CHECKING

import click

from dllama.cli.info import table
from dllama.cli.live import Live, cells
from dllama.cli.report import FIGURES, visible

if TYPE_CHECKING:
    from dllama import Llama, Piece
    from dllama.cluster.plan import Plan

REDRAW_SECONDS = 0.2
WINDOW = 16
"""Tokens that the table is about while they come; in the end it is about all of them."""

LATE_SECONDS = 2.0
"""A token that takes longer is worth a word."""

HEADING = ("node", "share", "inference", "transfer", "sent", "received", "")


class Top:
    """The table for a run whose pieces grow, as long as a block lasts; at the block's end it stays, for all tokens.

    Where standard error is no terminal there is only the table at the end.
    """

    def __init__(self, live: Live, llama: Llama, pieces: Sequence[Piece]):
        self._live, self._llama, self._pieces = live, llama, pieces
        self._above = live.terminal and sys.stdout.isatty()  # text and table are on one screen
        self._rows = ""  # of text, not on the screen yet
        self._row = ""  # the last one, which is not full
        self._count, self._last = 0, time.monotonic()
        self._end = threading.Event()
        self._thread = threading.Thread(target=self._run, name="dllama-top", daemon=True)

    def write(self, text: str) -> None:
        """Print what is generated."""
        if not self._above:
            click.echo(text, nl=False)
            return
        with self._live.lock:
            for line in text.splitlines(keepends=True):
                self._add(visible(line.rstrip("\r\n")))
                if line.endswith("\n"):
                    self._break()

    def __enter__(self) -> Top:
        if self._live.terminal:
            self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._end.set()
        if self._thread.is_alive():
            self._thread.join()
        if self._row:
            self._break()
        self._draw(node_rows(self._pieces, self._llama.plan))
        self._live.keep()

    def _add(self, text: str) -> None:
        columns = self._live.columns
        for character in text:
            if cells(self._row + character) > columns:
                self._break()
            self._row += character

    def _break(self) -> None:
        self._rows, self._row = f"{self._rows}{self._row}\n", ""

    def _run(self) -> None:
        while not self._end.wait(REDRAW_SECONDS):
            rows = node_rows(self._pieces[-WINDOW:], self._llama.plan)
            if len(self._pieces) > self._count:
                self._count, self._last = len(self._pieces), time.monotonic()
            waits = time.monotonic() - self._last
            if waits > LATE_SECONDS:
                rows[-1] += f", {waits:.0f} s for the next so far"
            self._draw(rows)

    def _draw(self, rows: list[str]) -> None:
        """The text that has come since, and below it the table."""
        if not self._live.terminal:
            click.echo("\n".join(rows), err=True)
            return
        with self._live.lock:
            if self._rows:
                self._live.erase()
                click.echo(self._rows, nl=False)
                self._rows = ""
            self._live.draw([*([self._row] if self._row else []), *rows])


def node_rows(pieces: Sequence[Piece], plan: Plan | None) -> list[str]:
    """A table of what these tokens cost each node on average, and a line with their speed.

    The first token of a run is part of its prompt, and tells nothing of a node.
    """
    shares = {} if plan is None else {share.node.name: share.weight_bytes for share in plan.shares}
    costs = [cost for piece in pieces for cost in piece.nodes]
    names = dict.fromkeys([*shares, *(cost.name for cost in costs)])
    means = {name: _means([cost for cost in costs if cost.name == name]) for name in names}
    at_work = [name for name in names if means[name] and (plan is None or name in shares)]
    slowest = max(at_work, key=lambda name: means[name][0]) if len(at_work) > 1 else None
    rows = [HEADING]
    for name in names:
        share = f"{100 * shares[name] / sum(shares.values()):.0f} %" if name in shares else "" if plan else "100 %"
        remark = "slowest" if name == slowest else "lost" if plan and name not in shares else ""
        rows.append((name, share, *_cells(means[name]), remark))
    if plan is not None:
        rows += [(node.name, "", *_cells(None), "left out") for node, _ in plan.left_out if node.name not in names]
    return ["", *(line.rstrip() for line in table(rows).split("\n")), _speed(pieces)]


def _means(costs: Sequence) -> tuple[float, ...] | None:
    return tuple(fmean(getattr(cost, figure) for cost in costs) for figure in FIGURES) if costs else None


def _cells(means: tuple[float, ...] | None) -> tuple[str, ...]:
    if means is None:
        return ("",) * len(FIGURES)
    inference, transfer, sent, received = means
    return f"{inference:.1f} ms", f"{transfer:.1f} ms", f"{sent / 1000:.1f} kB", f"{received / 1000:.1f} kB"


def _speed(pieces: Sequence[Piece]) -> str:
    times = [piece.generation_ms for piece in pieces if piece.nodes]
    return f"{1000 / fmean(times):.2f} tokens/s" if times else "the prompt is being read"
