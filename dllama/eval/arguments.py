"""The harness's ``--model_args``: the options of every command that runs a model, with "_" for "-"."""

from collections.abc import Mapping
from contextlib import ExitStack
from typing import Any

import click

from dllama.cli.options import model_options, open_llama
from dllama.errors import ModelError
from dllama.llama import Llama


@click.command(add_help_option=False)
@click.option("--context", type=click.IntRange(min=1))
@model_options
def _parser(**_) -> None:
    """Holds the options; it is parsed with and never run."""


def open_model(arguments: Mapping[str, Any]) -> tuple[Llama, ExitStack]:
    """The model that the arguments ask for, and what lets go of it and its workers when it is closed.

    Several workers are joined by "+", as the harness splits at commas, or given as a list. Raises ModelError for
    arguments that do not exist or make no sense, and what loading a model raises.
    """
    with ExitStack() as stack:
        try:
            options = _parser.make_context("model_args", _command_line(arguments)).params
            llama = stack.enter_context(open_llama(**options))
        except click.UsageError as error:
            raise ModelError(f"model_args: {error.format_message()}") from None
        return llama, stack.pop_all()


def _command_line(arguments: Mapping[str, Any]) -> list[str]:
    words = []
    for name, value in arguments.items():
        option = f"--{name.replace('_', '-')}"
        if name == "workers":
            value = ",".join(value) if isinstance(value, list | tuple) else str(value).replace("+", ",")
        if value is True:
            words.append(option)
        elif value is not False and value is not None:
            words.append(f"{option}={value}")
    return words
