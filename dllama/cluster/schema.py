"""What a field of a message may hold: checkers, made of bounds, for values that came from elsewhere.

A checker takes a value as msgpack gives it and returns what is wrong with it, or None. Types are exact: a bool is no
integer, and nothing is converted. Lists may be tuples.
"""

import math
import reprlib
from collections.abc import Callable

Checker = Callable[[object], "str | None"]

LISTS = (list, tuple)


def integer(low: int, high: int) -> Checker:
    """A whole number from ``low`` to ``high``."""

    def check(value):
        if type(value) is int and low <= value <= high:
            return None
        return f"{reprlib.repr(value)} is no whole number from {low} to {high}"

    return check


def real(low: float, high: float) -> Checker:
    """A finite number from ``low`` to ``high``."""

    def check(value):
        if type(value) in (float, int) and low <= value <= high and math.isfinite(value):
            return None
        return f"{reprlib.repr(value)} is no number from {low} to {high}"

    return check


def text(most: int) -> Checker:
    """At most so many characters on one line, and none that could move a terminal's cursor."""

    def check(value):
        if type(value) is str and len(value) <= most and value.isprintable():
            return None
        return f"{reprlib.repr(value)} is no line of at most {most} printable characters"

    return check


def data(size: int) -> Checker:
    """Exactly so many bytes."""

    def check(value):
        return None if type(value) is bytes and len(value) == size else f"{reprlib.repr(value)} is not {size} bytes"

    return check


def boolean(value: object) -> str | None:
    """True or False."""
    return None if type(value) is bool else f"{reprlib.repr(value)} is neither true nor false"


def one_of(*choices: int | str) -> Checker:
    """One of these; an enum's members are taken by value."""
    plain = [int(choice) if isinstance(choice, int) else choice for choice in choices]

    def check(value):
        if any(type(value) is type(choice) and value == choice for choice in plain):
            return None
        return f"{reprlib.repr(value)} is none of {', '.join(map(repr, plain))}"

    return check


def optional(checker: Checker) -> Checker:
    """None, or what ``checker`` lets pass."""
    return lambda value: None if value is None else checker(value)


def listing(checker: Checker, most: int) -> Checker:
    """A list of at most so many such values."""

    def check(value):
        if type(value) not in LISTS or len(value) > most:
            return f"{reprlib.repr(value)} is no list of at most {most}"
        return next(filter(None, map(checker, value)), None)

    return check


def row(*checkers: Checker) -> Checker:
    """A list with one value for each checker."""

    def check(value):
        if type(value) not in LISTS or len(value) != len(checkers):
            return f"{reprlib.repr(value)} is no list of {len(checkers)}"
        return next(filter(None, (checker(part) for checker, part in zip(checkers, value, strict=True))), None)

    return check


def span(most: int) -> Checker:
    """A range as [start, stop], neither above ``most``."""
    ends = row(integer(0, most), integer(0, most))

    def check(value):
        return ends(value) or (f"the range {value} ends before it starts" if value[0] > value[1] else None)

    return check


def mapping(fields: dict[str, Checker]) -> Checker:
    """A dict with exactly these keys."""

    def check(value):
        if type(value) is not dict or value.keys() != fields.keys():
            return f"{reprlib.repr(value)} has not the keys {', '.join(fields)}"
        for name, checker in fields.items():
            wrong = checker(value[name])
            if wrong:
                return f"{name}: {wrong}"
        return None

    return check
