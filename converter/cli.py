"""The command ``dllama-convert``."""

import os
import signal
import sys
import time
from pathlib import Path

import click

from converter import privatelora, to_gguf
from converter.convert import Settings, convert
from converter.progress import progress
from converter.tokenizer import convert_tokenizer
from dllama.cli.program import Program
from dllama.errors import FileError
from dllama.formats import FloatType
from dllama.formats.manifest import manifest_path

FLOAT_TYPES = [member.name.lower() for member in FloatType]
FLOAT_TYPE = click.Choice(FLOAT_TYPES, case_sensitive=False)


class Converter(Program):
    """A group in which a path in place of a command's name is a checkpoint to convert."""

    def resolve_command(self, ctx: click.Context, args: list[str]) -> tuple:
        """As click's, but ``PATH ...`` is ``model PATH ...``."""
        if args[0] not in self.commands and (os.path.exists(args[0]) or os.sep in args[0]):
            args = ["model", *args]
        return super().resolve_command(ctx, args)


def model_options(command):
    """The options of every command that writes a `.m` file."""
    options = (
        click.option(
            "--weights-float-type",
            type=FLOAT_TYPE,
            help="How to store the weights: q40 (the default) takes 4.5 bits each, q80 8.5, f16 16, f32 32.",
        ),
        click.option(
            "--seq-len",
            type=click.IntRange(min=1),
            help="Longest context to allow, up to the checkpoint's own (the default): a shorter one needs less memory.",
        ),
        click.option(
            "--imatrix",
            type=click.Path(path_type=Path),
            help="Weigh the errors of q40 by the activations that 'dllama imatrix' recorded in this file.",
        ),
        click.option("--reference", is_flag=True, help="Write the reference quantiser's q40, of larger error."),
        click.option(
            "--allow-non-finite",
            is_flag=True,
            help="Write weights that are NaN or infinite as 0; else they are refused.",
        ),
        click.option(
            "-o",
            "--output",
            type=click.Path(path_type=Path),
            help="File to write. [default: dllama_model_NAME_TYPE.m, here]",
        ),
        force_option,
    )
    for option in reversed(options):
        command = option(command)
    return command


force_option = click.option("--force", is_flag=True, help="Replace the output where it exists.")


def check_outputs(force: bool, *paths: Path) -> None:
    """FileError where an output exists and is not to be replaced, before any work is done."""
    for path in paths:
        if os.path.exists(path) and not force:
            raise FileError(path, "exists already (--force replaces it)")


@click.group(cls=Converter, name="dllama-convert", context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Turn checkpoints and tokenizers into the files that dllama runs.

    \b
    A model takes two files:
      dllama-convert ./TinyLlama-1.1B-Chat q40 -o tinyllama-q40.m
      dllama-convert tokenizer ./TinyLlama-1.1B-Chat -o tinyllama.t
    Then:
      dllama inference --model tinyllama-q40.m --tokenizer tinyllama.t --prompt "Hello"
    """
    # A conversion that is told to end removes what it has written, as one that is interrupted does. SIGHUP comes when
    # the terminal is closed, and is ignored where nohup said so.
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.argument("float_type", metavar="[TYPE]", type=FLOAT_TYPE, required=False)
@model_options
def model(path: Path, float_type: str | None, weights_float_type: str | None, **options) -> None:
    """Convert a checkpoint to a .m file; its form is recognised. The word "model" may be left out.

    PATH is a folder as Meta or Hugging Face publish it, or a GGUF file; TYPE is f32, f16, q40 or q80.

    \b
    Examples:
      dllama-convert /path/to/llama-2-7b q40
      dllama-convert ./Qwen3-0.6B q80 --seq-len 4096 -o qwen3-q80.m
      dllama-convert Llama-3.2-1B-Instruct-Q4_K_M.gguf -o llama-3.2-1b-q40.m
    """
    if float_type and weights_float_type:
        raise click.UsageError("TYPE and --weights-float-type say the same: give one of them")
    convert_model(None, path, float_type or weights_float_type, **options)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@model_options
def hf(folder: Path, **options) -> None:
    """Convert a Hugging Face checkpoint to a .m file.

    FOLDER holds config.json and model.safetensors or pytorch_model.bin, or several such files and their index, of a
    LlamaForCausalLM, MistralForCausalLM, Qwen3ForCausalLM or Qwen3MoeForCausalLM model in bf16, f16 or f32. It is read
    a few megabytes at a time, so a model larger than the memory converts as well.

    \b
    Examples:
      dllama-convert hf ./Llama-3.2-1B-Instruct -o llama-3.2-1b-q40.m
      dllama-convert hf ./Qwen3-0.6B --weights-float-type q80 --seq-len 4096 -o qwen3-q80.m
      dllama-convert hf ./Qwen3-0.6B --imatrix qwen3.imatrix -o qwen3-q40.m
    """
    convert_model("hf", folder, **options)


@main.command()
@click.argument("folder", type=click.Path(path_type=Path))
@model_options
def meta(folder: Path, **options) -> None:
    """Convert a checkpoint of Meta's own to a .m file.

    FOLDER holds params.json and consolidated.00.pth, or several of them, of Llama 1, 2, 3, 3.1 or 3.2 (text). Nothing
    in these files is executed, and torch is not needed.

    \b
    Examples:
      dllama-convert meta ./llama-2-7b --weights-float-type q40 -o llama-2-7b-q40.m
      dllama-convert meta ./Meta-Llama-3-8B-Instruct --weights-float-type q80 -o llama-3-8b-q80.m
    """
    convert_model("meta", folder, **options)


@main.command()
@click.argument("file", type=click.Path(path_type=Path))
@model_options
def gguf(file: Path, **options) -> None:
    """Convert the model in a GGUF file to a .m file.

    FILE holds a llama, qwen3 or qwen3moe model. Weights of its Q4_0 and Q8_0 are copied where the .m file has the same
    type; those of K-quants are rounded a second time, so a file of larger type gives a better model.

    \b
    Examples:
      dllama-convert gguf Llama-3.2-1B-Instruct-Q4_0.gguf -o llama-3.2-1b-q40.m
      dllama-convert gguf Qwen3-0.6B-Q8_0.gguf --weights-float-type q80 -o qwen3-q80.m
    """
    convert_model("gguf", file, **options)


def convert_model(
    form: str | None,
    path: Path,
    weights_float_type: str | None,
    seq_len: int | None,
    imatrix: Path | None,
    reference: bool,
    allow_non_finite: bool,
    output: Path | None,
    force: bool,
) -> None:
    """Convert the checkpoint at ``path`` and say what came out."""
    weight_type = FloatType.parse(weights_float_type or "q40")
    if imatrix and (reference or weight_type is not FloatType.Q40):
        raise click.UsageError("--imatrix makes a difference to q40 alone, and without --reference")
    name = path.stem if os.path.isfile(path) else os.path.basename(os.path.realpath(path))
    output = output or Path(f"dllama_model_{name}_{weight_type.name.lower()}.m")
    check_outputs(force, output, manifest_path(output))
    started = time.monotonic()
    settings = Settings(weight_type, imatrix, reference=reference, allow_non_finite=allow_non_finite)
    result = convert(path, output, settings, seq_len=seq_len, form=form, progress=progress)
    for name, count in result.zeroed.items():
        click.echo(f"{name}: {count:,} values were not finite and became 0", err=True)
    config = result.config
    click.echo(
        f"{output}: {output.stat().st_size:,} bytes from a {result.kind}, {config.arch.name.lower()}, "
        f"{config.n_layers} layers, {config.weight_type.name.lower()}, context {config.seq_len:,}, "
        f"{time.monotonic() - started:.0f} s"
    )


@main.command()
@click.argument("path", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write.")
@force_option
def tokenizer(path: Path, output: Path, force: bool) -> None:
    """Convert a tokenizer to a .t file.

    PATH is a tokenizer.model of SentencePiece or Llama 3, a tokenizer.json, a GGUF file, a llama2.c tokenizer.bin, an
    older .t file, or a checkpoint folder that holds one; a folder's chat template and eos ids come along.

    \b
    Examples:
      dllama-convert tokenizer ./TinyLlama-1.1B-Chat -o tinyllama.t
      dllama-convert tokenizer tokenizer.bin -o stories.t
    """
    check_outputs(force, output)
    vocabulary = convert_tokenizer(path, output)
    template = ", with a chat template" if vocabulary.chat_template else ""
    click.echo(f"{output}: {len(vocabulary.pieces):,} tokens{template}")


main.add_command(to_gguf.command)
main.add_command(privatelora.command)
