"""Devices as the command line describes them, and options that take several values after one name."""

from collections.abc import Iterator
from dataclasses import dataclass

import click

from dllama.cli import quantities


@dataclass(frozen=True)
class Device:
    """A well-known device."""

    read_speed: float  # bytes a second
    source: str


DEVICES = {
    "pi4": Device(4e9, "published memory bandwidth, about 4 GB/s"),
    "pi5": Device(9e9, "published memory bandwidth, 9 to 17 GB/s"),
}

KINDS = (
    ("read_speed", quantities.BYTES_PER_SECOND),
    ("bandwidth", quantities.LINK),
    ("latency", quantities.SECONDS),
    ("memory", quantities.BYTES),
)


class NodeList(click.ParamType):
    """Nodes with commas between them: NAME, or NAME=PART:PART..., each part told by its unit.

    A node becomes (name, fields): a dict of what is told of ``read_speed``, ``memory``, ``bandwidth``, ``latency``
    and ``device``.
    """

    name = "nodes"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        return tuple(self._node(text.strip(), param, ctx) for text in value.split(","))

    def _node(self, text, param, ctx):
        name, equals, parts = text.partition("=")
        if not name or name.startswith("-") or (equals and not parts):
            self.fail(f"{text!r} is not a node such as desk, desk=10GB/s:4GiB or shelf=pi4:2GB", param, ctx)
        if not equals and _part(name)[0] not in (None, "device"):
            self.fail(
                f"{name!r} is no name for a node; what is known of one is joined by colons: a=4GB/s:2GiB", param, ctx
            )
        fields = {}
        for part in parts.split(":") if parts else ():
            kind, value = _part(part)
            if kind is None:
                known = (
                    f"a speed (4GB/s), memory (2GiB), link (1gbit), latency (0.2ms) or device ({', '.join(DEVICES)})"
                )
                self.fail(f"node {name}: {part!r} is not {known}", param, ctx)
            if kind in fields:
                self.fail(f"node {name}: {kind.replace('_', ' ')} is given twice", param, ctx)
            fields[kind] = value
        return name, fields


def _part(text: str) -> tuple[str | None, float | str | None]:
    if text.lower() in DEVICES:
        return "device", text.lower()
    found = ((kind, quantities.parse(text, units)) for kind, units in KINDS)
    return next(((kind, value) for kind, value in found if value is not None), (None, None))


class Ratios(click.ParamType):
    """Numbers above zero with colons between them."""

    name = "ratios"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            return tuple(float(number) for number in value.split(":"))
        except ValueError:
            self.fail(f"{value!r} is not a list of numbers such as 2:1:1", param, ctx)


class SeveralValues(click.Command):
    """A command whose repeatable options take several values after one name as well: ``--nodes A B C``."""

    def parse_args(self, ctx, args):
        repeatable = {name for param in self.params if param.multiple for name in param.opts}
        return super().parse_args(ctx, list(_repeated(args, repeatable, ctx)))


def _repeated(args: list[str], names: set[str], ctx: click.Context) -> Iterator[str]:
    """The arguments with ``--name a b c`` written as ``--name a --name b --name c``. Raises BadOptionUsage for a name
    with no value before the next option."""
    name, values = None, 0
    for arg in args:
        if not arg.startswith("-") and name:
            if values:
                yield name
            values += 1
        else:
            if name and not values:  # click would take the next option for its value
                raise click.BadOptionUsage(name, f"Option {name!r} requires an argument.", ctx)
            option, equals, _ = arg.partition("=")
            name, values = (option if option in names else None), bool(equals)
        yield arg
