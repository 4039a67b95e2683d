"""Which edges' passages the cloud takes on next, and how long it waits for others to come along.

A pass over the weights costs about the same for one edge's row and for several edges', so edges that are at the same
place are worth bringing together; but nobody shall wait long for one on a slow line. So a passage that could go on
waits for the others, at most as long as a pass for them alone would take: then waiting never costs more than twice what
knowing the future would (the ski rental problem). Whoever was waited for in vain has half the share of that the next
time (its ``hope``), and all of it once it comes along again.

Passages that enter wait for those that are on their way, and for edges whose last step has just ended, as these will
want to enter soon.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dllama.engine.workspace import MAX_ROWS
from dllama.privatelora.session import Session

LEAST_HOPE = 1 / 64


@dataclass
class Costs:
    """Seconds that a pass from one stop to the next takes, and a whole step; running averages."""

    pass_seconds: float = 0.0
    step_seconds: float = 0.0

    def passed(self, seconds: float) -> None:
        self.pass_seconds += (seconds - self.pass_seconds) / 8

    def stepped(self, seconds: float) -> None:
        self.step_seconds += (seconds - self.step_seconds) / 8


def choose(sessions: Sequence[Session], costs: Costs, now: float) -> tuple[list[Session], float | None]:
    """The sessions to take on now, together; or none, and the seconds until that may change by itself (None: only an
    edge can change it)."""
    waiting = None
    for first in sorted((s for s in sessions if s.ready_at is not None), key=lambda s: s.ready_at):
        group = _together(first, sessions)
        awaited, patience = _awaited(first, sessions, costs, now)
        left = max((first.ready_at + patience * s.hope - now for s in awaited), default=0.0)
        if left <= 0 or sum(s.rows for s in group) >= MAX_ROWS:
            for session in awaited:
                session.hope = max(LEAST_HOPE, session.hope / 2)
            if len(group) > 1:
                for session in group:
                    session.hope = 1.0
            return group, None
        waiting = left if waiting is None else min(waiting, left)
    return [], waiting


def _together(first: Session, sessions: Sequence[Session]) -> list[Session]:
    """Those that are ready for the same pass, as many as fit beside the first, which may be larger than any."""
    rows, group = 0, []
    for session in [first, *(s for s in sessions if s is not first and s.ready_at is not None)]:
        if (session.came_from, session.goes_to) == (first.came_from, first.goes_to):
            rows += session.rows
            if group and rows > MAX_ROWS:
                break
            group.append(session)
    return group


def _awaited(first: Session, sessions: Sequence[Session], costs: Costs, now: float) -> tuple[list[Session], float]:
    """Those that may soon be where this one is, and the seconds that they are worth at most."""
    others = [s for s in sessions if s is not first]
    if isinstance(first.came_from, int):  # it enters
        soon = [
            s
            for s in others
            if (s.passages and not isinstance(s.came_from, int))
            or (not s.passages and now - s.left_at < costs.step_seconds)
        ]
        return soon, costs.step_seconds
    same = [
        s
        for s in others
        if s.passages and s.ready_at is None and (s.came_from, s.goes_to) == (first.came_from, first.goes_to)
    ]
    return same, costs.pass_seconds
