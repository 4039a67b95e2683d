"""The options of every command that runs a model, and the model they ask for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import click

from dllama.cli.cluster_options import CLUSTER_OPTIONS, cluster
from dllama.cli.live import Live
from dllama.cli.progress import Progress
from dllama.cli.report import visible
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
    *CLUSTER_OPTIONS,
)


def model_options(command):
    """Give a command the options above and those of a cluster; it hands them to `open_llama` as they are."""
    for option in reversed(MODEL_OPTIONS):
        command = option(command)
    return command


@contextmanager
def open_llama(
    model: str | None,
    tokenizer: str | None,
    weights_float_type: str | None,
    buffer_float_type: str,
    kv_float_type: str,
    nthreads: int | None,
    context: int | None,
    adapters: Mapping[str, str] | None = None,
    edge: Mapping | None = None,
    live: Live | None = None,
    **cluster_values,
) -> Iterator[Llama]:
    """The model that the options ask for, loaded, with room for `context` tokens (None: the model's own context).

    ``adapters``: as `Llama` takes them; ``edge``: what `EdgeSettings` has beside the cloud, where this machine is to be
    the edge of PrivateLoRA; ``live``: where to show how far it is, and what happens later. The end of the
    block lets go of the workers.

    Raises DllamaError, and click.UsageError for options that make no sense together.
    """
    if model and not tokenizer:
        raise click.UsageError("--model needs --tokenizer with it: the tokenizer file that belongs to the model")
    if tokenizer and not model:
        raise click.UsageError("--tokenizer needs --model with it: the embedded model has a tokenizer of its own")
    progress = Progress(live or Live(), lambda line: click.echo(f"🔔 {visible(line)}", err=True))
    cloud_model = None if edge is None else str(open_model_file(model).path)
    values = cluster_values | {"nthreads": nthreads, "notify": progress.say, "cloud_model": cloud_model}
    with cluster(**values) as (settings, nthreads):
        from dllama import Llama
        from dllama.privatelora.settings import EdgeSettings

        private = None
        if edge is not None:
            private = EdgeSettings(settings.workers[0], settings.key, step_timeout=settings.step_timeout, **edge)

        try:
            llama = Llama(
                model,
                tokenizer,
                nthreads=nthreads,
                context=context,
                weights_float_type=weights_float_type,
                buffer_float_type=buffer_float_type,
                kv_float_type=kv_float_type,
                cluster=None if private else settings,
                private=private,
                adapters=adapters,
                notify=progress.say,
                progress=progress,
            )
        finally:
            progress.end()
        with llama:
            yield llama


def open_model_file(model: str | None) -> ModelFile:
    """The file that `open_llama` would load, its header at hand and no weights touched."""
    from dllama.embedded import model_path

    return ModelFile(model or model_path())
