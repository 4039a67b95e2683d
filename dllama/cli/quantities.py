"""Quantities as people write them: "4GB/s", "512MiB", "1gbit", "0.2ms"."""

import math
import re

import click

PREFIXES = {"": 1, "k": 1e3, "m": 1e6, "g": 1e9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}

BYTES = {prefix + "b": factor for prefix, factor in PREFIXES.items()}
BYTES_PER_SECOND = {unit + "/s": factor for unit, factor in BYTES.items()}
LINK = {prefix + "bit": PREFIXES[prefix] / 8 for prefix in ("k", "m", "g")}  # in bytes a second
SECONDS = {"s": 1, "ms": 1e-3, "us": 1e-6}

NUMBER = re.compile(r"(\d+(?:\.\d*)?|\.\d+) *([a-z/]+)", re.IGNORECASE | re.ASCII)


def parse(text: str, units: dict[str, float]) -> float | None:
    """The quantity in the base unit of ``units``; None where the text is no number with one of these units."""
    match = NUMBER.fullmatch(text.strip())
    if match is None or match[2].lower() not in units:
        return None
    value = float(match[1]) * units[match[2].lower()]
    return value if math.isfinite(value) else None


class Quantity(click.ParamType):
    """A number with a unit; it becomes a float in the base unit."""

    def __init__(self, name: str, units: dict[str, float], example: str):
        self.name, self._units, self._example = name, units, example

    def convert(self, value, param, ctx):
        if isinstance(value, float):
            return value
        number = parse(value, self._units)
        if number is None:
            self.fail(f"{value!r} is not a {self.name} such as {self._example}", param, ctx)
        return number
