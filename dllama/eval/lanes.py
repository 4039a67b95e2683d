"""Many requests over one engine: a step has rows of several of them, each in a sequence of its own."""

from collections.abc import Iterator, Sequence
from os.path import commonprefix
from typing import Any, Protocol

from dllama.engine.candidates import Candidates, Reduction
from dllama.engine.interface import Engine, Row
from dllama.engine.workspace import MAX_ROWS
from dllama.llama import LOGIT_ROWS


class Request(Protocol):
    """What a lane runs: it ends when all of its tokens have been fed.

    tokens: what to feed, at least one, from position 0 on;  wanted_from: the first position whose candidates it needs
    """

    tokens: list[int]
    wanted_from: int

    def take(self, candidates: Candidates) -> None:
        """The candidates for what follows the next wanted position; may add to ``tokens``."""


def run(engine: Engine, requests: Sequence[Request], reduction: Reduction, n_lanes: int) -> Iterator[int]:
    """Runs the requests, up to ``n_lanes`` at a time; yields the index of each one that ends.

    They are sorted by their tokens and those of a lane follow each other in one sequence, so that a beginning which
    neighbours share, such as a question with several answers, is run once.
    """
    order = sorted(range(len(requests)), key=lambda i: requests[i].tokens)
    size = -(-len(order) // n_lanes) or 1
    lanes = [
        _Lane(engine.sequence(), [(i, requests[i]) for i in order[first : first + size]])
        for first in range(0, len(order), size)
    ]
    while lanes:
        rows: list[Row] = []
        wanted: list[int] = []
        taken = []
        for n_left, lane in zip(range(len(lanes), 0, -1), lanes, strict=True):
            room, logits = (MAX_ROWS - len(rows)) // n_left, (LOGIT_ROWS - len(wanted)) // n_left
            own, own_wanted = lane.rows(room, logits)
            wanted += range(len(rows) + len(own) - own_wanted, len(rows) + len(own))
            rows += own
            taken.append((lane, len(own), own_wanted))
        found = iter(engine.step(rows, wanted, reduction))
        for lane, n_rows, n_wanted in taken:
            yield from lane.advance(n_rows, [next(found) for _ in range(n_wanted)])
        lanes = [lane for lane in lanes if not lane.is_done]


class _Lane:
    """A sequence of the engine, and the requests that run in it one after the other."""

    def __init__(self, sequence: Any, queue: list[tuple[int, Request]]):
        self._sequence, self._queue = sequence, queue[::-1]
        self._held: list[int] = []  # the tokens that the sequence holds
        self._begin()

    @property
    def is_done(self) -> bool:
        return not self._queue

    def rows(self, room: int, logits: int) -> tuple[list[Row], int]:
        """The next rows, at most ``room`` of which the last ones, at most ``logits``, are wanted; and their number."""
        request, start = self._queue[-1][1], len(self._held)
        end = min(len(request.tokens), start + room, max(start, request.wanted_from) + logits)
        rows = [Row(self._sequence, position, request.tokens[position]) for position in range(start, end)]
        return rows, max(0, end - max(start, request.wanted_from))

    def advance(self, n_rows: int, found: list[Candidates]) -> Iterator[int]:
        """Takes what came of the last rows; yields the request's index where it has ended."""
        index, request = self._queue[-1]
        self._held += request.tokens[len(self._held) : len(self._held) + n_rows]
        for candidates in found:
            request.take(candidates)
        if len(self._held) == len(request.tokens):
            self._queue.pop()
            if self._queue:
                self._begin()
            yield index

    def _begin(self) -> None:
        """Keeps of the sequence what the next request begins with; rows at later positions take the others' place."""
        request = self._queue[-1][1]
        shared = len(commonprefix([self._held, request.tokens]))
        del self._held[min(shared, request.wanted_from) :]
