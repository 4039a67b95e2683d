"""The command ``dllama-convert``."""

import os
import signal
import sys
import time
from pathlib import Path

import click

from converter import huggingface
from converter.hf_config import read_config
from converter.progress import progress
from converter.tokenizer import convert_tokenizer
from dllama.cli.program import Program
from dllama.errors import FileError
from dllama.formats import FloatType, weights_bytes

FLOAT_TYPES = [member.name.lower() for member in FloatType]


def output_options(command):
    """``-o OUT`` and ``--force``."""
    out = click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write.")
    force = click.option("--force", is_flag=True, help="Replace the output where it exists.")
    return out(force(command))


def check_output(path: Path, force: bool) -> None:
    """FileError where the output exists and is not to be replaced, before any work is done."""
    if os.path.exists(path) and not force:
        raise FileError(path, "exists already (--force replaces it)")


@click.group(cls=Program, name="dllama-convert", context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Turn checkpoints and tokenizers into the files that dllama runs.

    \b
    A model takes two files:
      dllama-convert hf ./TinyLlama-1.1B-Chat --weights-float-type q40 -o tinyllama-q40.m
      dllama-convert tokenizer ./TinyLlama-1.1B-Chat -o tinyllama.t
    Then:
      dllama inference --model tinyllama-q40.m --tokenizer tinyllama.t --prompt "Hello"
    """
    # A conversion that is told to end removes what it has written, as one that is interrupted does.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option(
    "--weights-float-type",
    type=click.Choice(FLOAT_TYPES, case_sensitive=False),
    default="q40",
    show_default=True,
    help="How to store the weights: q40 takes 4.5 bits each, q80 8.5, f16 16, f32 32.",
)
@click.option(
    "--seq-len",
    type=click.IntRange(min=1),
    help="Longest context to allow, at most the checkpoint's own (its default): a shorter one needs less memory.",
)
@click.option(
    "--search-scales",
    is_flag=True,
    help="Try several scales for each q40 block and keep the closest: a smaller error in the same size, but slow.",
)
@output_options
def hf(
    folder: Path, weights_float_type: str, seq_len: int | None, search_scales: bool, output: Path, force: bool
) -> None:
    """Convert a Hugging Face checkpoint to a .m file.

    FOLDER holds config.json and model.safetensors, or several .safetensors files and their index, of a
    LlamaForCausalLM, MistralForCausalLM or Qwen3ForCausalLM model in bf16, f16 or f32. It is read a few megabytes at a
    time, so a model larger than the memory converts as well.

    \b
    Examples:
      dllama-convert hf ./Llama-3.2-1B-Instruct -o llama-3.2-1b-q40.m
      dllama-convert hf ./Qwen3-0.6B --weights-float-type q80 --seq-len 4096 -o qwen3-q80.m
    """
    check_output(output, force)
    weight_type = FloatType.parse(weights_float_type)
    started = time.monotonic()
    total = weights_bytes(read_config(folder, weight_type, seq_len)[0])
    with progress(f"Writing {output.name}", total) as report:
        config = huggingface.convert(folder, output, weight_type, seq_len, search_scales, report)
    click.echo(
        f"{output}: {output.stat().st_size:,} bytes, {config.arch.name.lower()}, {config.n_layers} layers, "
        f"{config.weight_type.name.lower()}, context {config.seq_len:,}, {time.monotonic() - started:.0f} s"
    )


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@output_options
def tokenizer(path: Path, output: Path, force: bool) -> None:
    """Convert a tokenizer to a .t file.

    PATH is a SentencePiece tokenizer.model, a llama2.c tokenizer.bin, an older .t file, or a checkpoint folder that
    holds a tokenizer.model; a folder's chat template and eos ids come along.

    \b
    Examples:
      dllama-convert tokenizer ./TinyLlama-1.1B-Chat -o tinyllama.t
      dllama-convert tokenizer tokenizer.bin -o stories.t
    """
    check_output(output, force)
    vocabulary = convert_tokenizer(path, output)
    template = ", with a chat template" if vocabulary.chat_template else ""
    click.echo(f"{output}: {len(vocabulary.pieces):,} tokens{template}")
