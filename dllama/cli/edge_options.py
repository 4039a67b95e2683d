"""The options that make a command the edge of PrivateLoRA."""

from __future__ import annotations

from pathlib import Path

import click

from dllama.privatelora.settings import RECONNECT_TIMEOUT

PLORA = ".plora"


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
    click.option(
        "--reconnect-timeout",
        type=click.FloatRange(min=0),
        metavar="SECONDS",
        help="PrivateLoRA: how long to try to reach a cloud again that was lost; while it loads its model it is waited "
        f"for. [default: {RECONNECT_TIMEOUT:g}]",
    ),
)


def edge_options(command):
    """Give a command the options above."""
    for option in reversed(EDGE_OPTIONS):
        command = option(command)
    return command


def edge_values(
    mode: str, adapter: str | None, edge_layers, transfer_float_type, noise, reconnect_timeout
) -> dict | None:
    """What `EdgeSettings` has beside the cloud; None where the mode is another. Raises click.UsageError."""
    given = {
        "--edge-layers": edge_layers,
        "--transfer-float-type": transfer_float_type,
        "--noise": noise,
        "--reconnect-timeout": reconnect_timeout,
    }
    if mode == "privatelora":
        layers, form = edge_layers or (0, 0), transfer_float_type or "q80"
        patience = RECONNECT_TIMEOUT if reconnect_timeout is None else reconnect_timeout
        values = {"adapter": adapter, "edge_layers": layers, "form": form, "noise": noise or 0.0}
        return values | {"reconnect_timeout": patience}
    for name, value in given.items():
        if value is not None:
            raise click.UsageError(f"{name} is for --mode privatelora")
    if adapter is not None and _is_private(Path(adapter)):
        raise click.UsageError(
            f"--adapter {adapter} is one of PrivateLoRA: it needs --mode privatelora, and the cloud in --workers"
        )
    return None


def _is_private(path: Path) -> bool:
    """Whether it is a half of a PrivateLoRA adapter, or the folder of both."""
    return path.suffix == PLORA or (path.is_dir() and any(path.glob(f"*{PLORA}")))
