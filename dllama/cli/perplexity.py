"""`dllama perplexity`: how well a model predicts a text.

Perplexity per token is exp(-sum(ln p) / tokens), and per byte, which compares models with different tokenizers,
exp(-sum(ln p) / bytes), over the probabilities p that the model gives to each token of the text.

The text is read in windows: a window starts `stride` tokens after the one before, with the bos token in front where
the tokenizer puts one, and predicts `context` tokens at most. Each token is counted once, in the first window that
reaches it, so that after the first window every token has a history of at least `context - stride` tokens. Without a
bos token nothing predicts the first token of the text, and it is not counted.
"""

import json
import math
import sys
import time

import click

from dllama.cli.node_options import SeveralValues
from dllama.cli.options import model_options, open_llama, open_model_file
from dllama.cli.text import read_text
from dllama.errors import PromptError
from dllama.likelihood import negative_log_likelihood, windows

DEFAULT_CONTEXT = 512


def exponential(x: float) -> float:
    """exp(x), infinity where that is too large for a float: a model may be as wrong as that."""
    try:
        return math.exp(x)
    except OverflowError:
        return math.inf


@click.command(cls=SeveralValues)
@click.option("--file", "path", required=True, metavar="TEXT", help="Text file, UTF-8; - is standard input.")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    metavar="N",
    help=f"Tokens that the model sees at a time. [default: {DEFAULT_CONTEXT}, or the model's own if that is less]",
)
@click.option(
    "--stride", type=click.IntRange(min=1), metavar="N", help="Tokens from window to window. [default: the context]"
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
@model_options
def perplexity(path, context, stride, as_json, **options) -> None:
    """Measure how well a model predicts a text: lower is better.

    The text is cut into windows of --context tokens, each beginning with the bos token, and every token of the text
    is counted once. A --stride below the context gives tokens more history, and takes longer.

    \b
      dllama perplexity --file story.txt
      dllama perplexity --model model.m --tokenizer tokenizer.t --file wiki.txt --context 2048 --stride 1024
    """
    text = read_text(path)
    if context is None:
        with open_model_file(options["model"]) as file:
            context = min(DEFAULT_CONTEXT, file.config.seq_len)
    stride = stride or context
    if stride > context:
        raise click.UsageError(f"--stride {stride} would skip tokens: it can be at most the context, {context}")

    with open_llama(**options, context=context) as llama:
        tokens = llama.tokenizer.encode(text, bos=False)
        parts = list(windows(tokens, llama.tokenizer.encode(""), context, stride))
        if not parts:
            raise PromptError(f"{path}: nothing to predict in {len(tokens)} tokens")
        started = time.perf_counter()
        with click.progressbar(parts, label="windows", file=sys.stderr) as progress:
            total = sum(negative_log_likelihood(llama.logits(fed), counted) for fed, counted in progress)

    n_tokens = sum(len(counted) for _, counted in parts)
    n_bytes = len(text.encode())
    result = {
        "perplexity": exponential(total / n_tokens),
        "perplexity_per_byte": exponential(total / n_bytes),
        "tokens": n_tokens,
        "bytes": n_bytes,
        "context": context,
        "stride": stride,
        "seconds": time.perf_counter() - started,
    }
    click.echo(json.dumps(result, indent=2) if as_json else _table(result))


def _table(result: dict) -> str:
    return (
        f"perplexity per token  {result['perplexity']:.4f}\n"
        f"perplexity per byte   {result['perplexity_per_byte']:.4f}\n"
        f"tokens                {result['tokens']}\n"
        f"bytes                 {result['bytes']}\n"
        f"context, stride       {result['context']}, {result['stride']}"
    )
