"""Which edges' passages the cloud takes on next, and how long it waits for others to come along.

A pass over the weights costs about the same for one edge's row and for several edges', so edges that are at the same
place are worth bringing together; but nobody shall wait long for one on a slow line. So a passage that could go on
waits for the others, at most as long as a pass for them alone would take: then waiting never costs more than twice what
knowing the future would (the ski rental problem). Whoever was waited for in vain has half the share of that the next
time (its ``hope``). It gets all of it when it comes along from one stop to the next, and a little with every step.

Edges that are not at the same place, as they came at different times, get there where a step begins: passages that
enter wait for edges whose last step has just ended, as these will want to enter soon, and for those whose step ends
soon, to judge by its pace so far.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dllama.engine.workspace import MAX_ROWS
from dllama.privatelora.passage import Stop
from dllama.privatelora.session import Session

LEAST_HOPE = 1 / 64
REGAINED = 2**0.5
"""By so much hope grows with every step: less than one wait in vain takes of it, or slow lines would be waited for."""


@dataclass
class Costs:
    """Seconds that a pass from one stop to the next takes, and a whole step; running averages."""

    pass_seconds: float = 0.0
    step_seconds: float = 0.0

    def passed(self, seconds: float) -> None:
        self.pass_seconds += (seconds - self.pass_seconds) / 8

    def ended(self, session: Session) -> None:
        """A step of an edge has; others will wait for it a little longer again."""
        self.step_seconds += (session.seconds - self.step_seconds) / 8
        session.hope = min(1.0, REGAINED * session.hope)


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
            if len(group) > 1 and not (enters(first) and isinstance(first.goes_to, Stop)):
                for session in group:  # to begin a step together proves nothing of their lines
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
    if enters(first):
        return [s for s in others if _enters_soon(s, costs, now)], costs.step_seconds
    same = [
        s
        for s in others
        if s.passages and s.ready_at is None and (s.came_from, s.goes_to) == (first.came_from, first.goes_to)
    ]
    return same, costs.pass_seconds


def enters(session: Session) -> bool:
    """Whether its next passage begins a step."""
    return not isinstance(session.came_from, Stop)


def _enters_soon(session: Session, costs: Costs, now: float) -> bool:
    """Whether an edge may be expected to want its next step begun before a step's time is over."""
    if not session.passages:
        return now - session.left_at < costs.step_seconds
    return not enters(session) and _left(session, now) < costs.step_seconds * session.hope


def _left(session: Session, now: float) -> float:
    """Seconds until a step that is on its way ends, at its pace so far."""
    return (now - session.set_out_at) / session.passed * session.passes_ahead
