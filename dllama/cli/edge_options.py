"""The options that make a command the edge of PrivateLoRA."""

from __future__ import annotations

import click


class EdgeLayers(click.ParamType):
    """Two numbers of layers with a colon between them."""

    name = "layers"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        first, colon, last = value.partition(":")
        if not (colon and all(part.isascii() and part.isdecimal() and len(part) < 6 for part in (first, last))):
            self.fail(f"{value!r} is not a pair of numbers such as 1:1", param, ctx)
        return int(first), int(last)


EDGE_OPTIONS = (
    click.option(
        "--mode",
        type=click.Choice(["cluster", "privatelora"], case_sensitive=False),
        default="cluster",
        show_default=True,
        help="What --workers are: nodes that share the model out, or the cloud of PrivateLoRA, which works the layers "
        "while text, embedding, output matrix and adapter stay here.",
    ),
    click.option(
        "--edge-layers",
        type=EdgeLayers(),
        metavar="A:B",
        help="PrivateLoRA: work the first A and the last B layers here. [default: 0:0]",
    ),
    click.option(
        "--transfer-float-type",
        type=click.Choice(["q80", "f16", "f32"], case_sensitive=False),
        help="PrivateLoRA: what values that travel are rounded to. [default: q80]",
    ),
    click.option(
        "--noise",
        type=click.FloatRange(0, 100),
        metavar="X",
        help="PrivateLoRA: add noise of X times their own size to the values that enter the cloud. [default: 0]",
    ),
)


def edge_options(command):
    """Give a command the options above."""
    for option in reversed(EDGE_OPTIONS):
        command = option(command)
    return command


def edge_values(mode: str, adapter: str | None, edge_layers, transfer_float_type, noise) -> dict | None:
    """What `EdgeSettings` has beside the cloud; None where the mode is another. Raises click.UsageError."""
    given = {
        "--edge-layers": edge_layers,
        "--transfer-float-type": transfer_float_type,
        "--noise": noise,
    }
    if mode == "privatelora":
        layers, form = edge_layers or (0, 0), transfer_float_type or "q80"
        return {"adapter": adapter, "edge_layers": layers, "form": form, "noise": noise or 0.0}
    for name, value in given.items():
        if value is not None:
            raise click.UsageError(f"{name} is for --mode privatelora")
    return None
