"""Lines at the bottom of the terminal that are redrawn in place, while other output goes by above them."""

import os
import sys
import threading
import unicodedata

import click


class Live:
    """The lines, on standard error. Where that is no terminal there are none, and all else is as it would be.

    May be used from several threads.
    """

    def __init__(self):
        self.terminal = sys.stderr.isatty()
        self.lock = threading.RLock()
        self._rows = 0  # that are on the screen now

    @property
    def columns(self) -> int:
        """Characters that fit into a line of the terminal."""
        try:
            return os.get_terminal_size(sys.stderr.fileno()).columns or 80
        except OSError:
            return 80

    def write(self, text: str) -> None:
        """Print what is generated, in place of the lines."""
        with self.lock:
            self.erase()
            click.echo(text, nl=False)

    def draw(self, lines: list[str]) -> None:
        """Show these lines in place of those that were there."""
        if self.terminal:
            with self.lock:
                columns = self.columns
                shown = "\n".join(crop(line, columns) for line in lines)
                click.echo(self._erasure() + shown, err=True, nl=False)
                self._rows = len(lines)

    def erase(self) -> None:
        """Take the lines away."""
        with self.lock:
            if self._rows:
                click.echo(self._erasure(), err=True, nl=False)
            self._rows = 0

    def keep(self) -> None:
        """Leave the lines where they are, for good."""
        with self.lock:
            if self._rows:
                click.echo(err=True)
            self._rows = 0

    def _erasure(self) -> str:
        up = f"\x1b[{self._rows - 1}A" if self._rows > 1 else ""
        return f"\r{up}\x1b[J" if self._rows else ""


def cells(text: str) -> int:
    """Columns that a text takes on a terminal."""
    return sum(_cells(character) for character in text)


def crop(text: str, columns: int) -> str:
    """The beginning of a text that fits into so many columns."""
    used = 0
    for i, character in enumerate(text):
        used += _cells(character)
        if used > columns:
            return text[:i]
    return text


def _cells(character: str) -> int:
    if unicodedata.combining(character):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
