"""`dllama train`: make an adapter for a model out of prompts and answers."""

import os
from functools import partial
from pathlib import Path

import click

from dllama.errors import FileError
from dllama.formats.files import reason
from dllama.lora import CONFIG_FILE
from dllama.privatelora.adapter import EDGE_FILE
from dllama.privatelora.frozen import MAX_SEED
from dllama.privatelora.shape import MAX_RANK
from dllama.targets import TARGETS, parse_targets


class Targets(click.ParamType):
    """Names of matrices, separated by commas."""

    name = "targets"

    def convert(self, value, param, ctx):
        if isinstance(value, tuple):
            return value
        try:
            return parse_targets(value)
        except ValueError as error:
            self.fail(str(error), param, ctx)


class LayerRange(click.ParamType):
    """FIRST:END, END itself not among them."""

    name = "layers"

    def convert(self, value, param, ctx):
        if isinstance(value, range):
            return value
        first, colon, end = value.partition(":")
        if not (colon and first.isdecimal() and end.isdecimal() and int(first) < int(end) <= 1 << 14):
            self.fail(f"{value!r} is not FIRST:END, such as 0:16", param, ctx)
        return range(int(first), int(end))


FOLDER = click.Path(path_type=Path)
RANK = click.IntRange(1, MAX_RANK)
COUNT = click.IntRange(min=1)
ABOVE_ZERO = click.FloatRange(min=0, min_open=True)


@click.group()
def train() -> None:
    """Train an adapter for a model that stays as it is. Needs the extra "train".

    \b
      dllama train privatelora --data train.jsonl -o my_adapter
    """


@train.command()
@click.option("--model", type=FOLDER, help="Hugging Face folder, or model file (.m). [default: the embedded model]")
@click.option("--tokenizer", type=FOLDER, help="Tokenizer file of the model; a folder may have its own.")
@click.option("--data", type=FOLDER, required=True, metavar="JSONL", help="Lines with prompt and answer, or messages.")
@click.option("-o", "--output", type=FOLDER, required=True, metavar="DIR", help="Folder to write.")
@click.option("--lora", is_flag=True, help="Train an ordinary LoRA instead, in PEFT's form.")
@click.option(
    "--rank", type=RANK, default=128, show_default=True, help="Values from the cloud to the edge: M's columns."
)
@click.option("--rank-back", type=RANK, help="Values from the edge to the cloud: M's rows. [default: those of --rank]")
@click.option("--alpha", type=ABOVE_ZERO, help="Scale of a LoRA, times its rank. [default: 2 x rank]")
@click.option(
    "--targets",
    type=Targets(),
    default="q,k,v",
    show_default=True,
    help=f"Matrices to adapt, separated by commas, of {', '.join(TARGETS)}.",
)
@click.option("--layers", type=LayerRange(), metavar="FIRST:END", help="Layers to adapt. [default: all]")
@click.option("--lr", type=ABOVE_ZERO, default=5e-3, show_default=True, help="Highest learning rate.")
@click.option("--epochs", type=ABOVE_ZERO, default=3.0, show_default=True, help="How often to see every example.")
@click.option("--steps", type=COUNT, help="How many steps to take, in place of --epochs.")
@click.option("--warmup", type=click.IntRange(min=0), default=0, help="Steps in which the learning rate rises.")
@click.option("--batch", type=COUNT, default=8, show_default=True, help="Examples at a time in memory.")
@click.option("--accumulate", type=COUNT, default=1, show_default=True, help="Batches in a step.")
@click.option("--clip", type=ABOVE_ZERO, default=1.0, show_default=True, help="Largest norm of the gradient.")
@click.option("--weight-decay", type=click.FloatRange(min=0), default=0.0, show_default=True)
@click.option("--context", type=click.IntRange(min=2), help="Leave longer examples out. [default: the model's context]")
@click.option("--bf16", is_flag=True, help="Hold the model in bfloat16: half the memory, less exact.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", show_default=True)
@click.option(
    "--seed", type=click.IntRange(0, MAX_SEED), default=0, show_default=True, help="Of A and B, and the order."
)
@click.option(
    "--float-type",
    type=click.Choice(["f16", "f32"]),
    default="f16",
    show_default=True,
    help="How to store M. A LoRA is always f32.",
)
@click.option("--save-every", type=COUNT, default=200, show_default=True, help="Steps between checkpoints.")
@click.option("--resume", is_flag=True, help="Continue from DIR/checkpoint.pt.")
@click.option("--force", is_flag=True, help="Replace an adapter that is in DIR already.")
def privatelora(output: Path, force: bool, **options) -> None:
    """Train PrivateLoRA: M between frozen A and B, which come from --seed.

    Each line of the data is {"prompt": "...", "answer": "..."}; for a model with a chat template it may be
    {"messages": [{"role": "user", "content": "..."}, ...]}. Only answers are learnt. DIR gets cloud.plora (A and B, or
    rather their seed) and edge.plora (M), besides the checkpoint and TensorBoard's events.

    \b
    Examples:
      dllama train privatelora --data facts.jsonl --rank 64 --epochs 20 -o facts
      dllama train privatelora --model ./Llama-2-7b-hf --data train.jsonl --rank 128 --lr 5e-3 \\
          --batch 8 --accumulate 32 --warmup 10 --bf16 -o gsm8k
      dllama train privatelora --lora --rank 16 --lr 2e-4 --data facts.jsonl -o facts-lora
    """
    if options["lora"] and options["rank_back"]:
        raise click.UsageError("--rank-back is of PrivateLoRA: a LoRA has one rank")
    if options["alpha"] and not options["lora"]:
        raise click.UsageError("--alpha is of a LoRA: PrivateLoRA has no scale")
    _check_output(output, options["lora"], force or options["resume"])
    try:
        from dllama.train.job import Job, run_job
    except ImportError as error:
        raise click.ClickException(f"{error.name} is missing: training needs pip install 'dllama[train]'") from None
    click.echo(run_job(Job(output=output, **options), partial(click.echo, err=True)))


def _check_output(output: Path, lora: bool, replace: bool) -> None:
    """FileError for an adapter that is there already, or a folder that cannot be made, before any work is done."""
    result = output / (CONFIG_FILE if lora else EDGE_FILE)
    if os.path.exists(result) and not replace:
        raise FileError(result, "exists already (--force replaces it)")
    try:
        output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(output, f"cannot be made: {reason(error)}") from None
