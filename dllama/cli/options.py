"""The options of every command that runs a model, and the model they ask for."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from dllama.formats.model import ModelFile

if TYPE_CHECKING:
    from dllama import Llama


def _choice(*names: str) -> click.Choice:
    return click.Choice(names, case_sensitive=False)


def buffer_float_type(help: str):
    """The option `--buffer-float-type`."""
    return click.option("--buffer-float-type", type=_choice("q80", "f32"), default="q80", show_default=True, help=help)


def kv_float_type(help: str):
    """The option `--kv-float-type`."""
    choices = _choice("f16", "f32", "q80")
    return click.option("--kv-float-type", type=choices, default="f16", show_default=True, help=help)


BAR_AFTER = 2.0
"""Seconds after which loading shows how far it is."""

MODEL_OPTIONS = (
    click.option("--model", metavar="FILE", help="Model file (.m). [default: the small embedded model]"),
    click.option("--tokenizer", metavar="FILE", help="Its tokenizer: .t, tokenizer.model or llama2.c tokenizer.bin."),
    click.option(
        "--weights-float-type",
        type=_choice("f32", "f16", "q40", "q80"),
        help="What the model file has to hold; the file itself says what it holds.",
    ),
    buffer_float_type("Activations that enter a product with the weights: q80 is fast, f32 is exact."),
    kv_float_type("Keys and values of past tokens: q80 takes about half the memory of f16."),
    click.option("--nthreads", type=click.IntRange(1, 256), metavar="N", help="Threads. [default: one for each core]"),
)


def model_options(command):
    """Give a command the options above; it hands them to `open_llama` as they are."""
    for option in reversed(MODEL_OPTIONS):
        command = option(command)
    return command


def open_llama(
    model: str | None,
    tokenizer: str | None,
    weights_float_type: str | None,
    buffer_float_type: str,
    kv_float_type: str,
    nthreads: int | None,
    context: int | None,
) -> Llama:
    """The model that the options ask for, loaded, with room for `context` tokens (None: the model's own context).

    Raises DllamaError, and click.UsageError for a model without a tokenizer or the reverse.
    """
    if model and not tokenizer:
        raise click.UsageError("--model needs --tokenizer with it: the tokenizer file that belongs to the model")
    if tokenizer and not model:
        raise click.UsageError("--tokenizer needs --model with it: the embedded model has a tokenizer of its own")
    from dllama import Llama

    with loading_bar() as progress:
        return Llama(
            model,
            tokenizer,
            nthreads=nthreads,
            context=context,
            weights_float_type=weights_float_type,
            buffer_float_type=buffer_float_type,
            kv_float_type=kv_float_type,
            notify=lambda line: click.echo(f"⏳ {line}", err=True),
            progress=progress,
        )


@contextmanager
def loading_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A `progress(task, done, total)` that draws a bar on standard error for each task that takes over BAR_AFTER."""
    bars, start = {}, time.monotonic()

    def progress(task: str, done: int, total: int) -> None:
        if task not in bars and time.monotonic() - start > BAR_AFTER:
            bars[task] = click.progressbar(length=total, label=task, file=sys.stderr)
        if task in bars:
            bars[task].update(done - bars[task].pos)

    try:
        yield progress
    finally:
        for bar in bars.values():
            bar.render_finish()


def open_model_file(model: str | None) -> ModelFile:
    """The file that `open_llama` would load, its header at hand and no weights touched."""
    from dllama.embedded import model_path

    return ModelFile(model or model_path())
