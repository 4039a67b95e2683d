"""What a check found."""

import enum
from dataclasses import dataclass


class State(enum.Enum):
    """How much of a problem it is."""

    OK = "ok"
    UNKNOWN = "unknown"  # the system does not tell
    SLOW = "slow"  # works, but could do better
    WRONG = "wrong"  # does not work


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. value: the figure behind the text, for programs; advice: what to do about it."""

    node: str
    check: str
    state: State
    text: str
    advice: str = ""
    value: int | float | str | None = None
