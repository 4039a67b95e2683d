"""`dllama imatrix`: record which columns of a model's matrices a text uses most."""

import os
import sys
from functools import partial

import click

from dllama.cli.options import open_model_file
from dllama.cli.text import read_text
from dllama.errors import FileError, ModelError, PromptError
from dllama.formats import FloatType, ModelFile
from dllama.formats.files import AtomicFile
from dllama.formats.imatrix import ImportanceMatrix, write_imatrix
from dllama.tokenizer import Tokenizer, load_tokenizer

DEFAULT_CONTEXT = 512


@click.command()
@click.option("--file", "path", required=True, metavar="TEXT", help="Text file, UTF-8; - is standard input.")
@click.option("-o", "--output", required=True, metavar="FILE", help="Importance matrix to write.")
@click.option("--force", is_flag=True, help="Replace the output where it exists.")
@click.option("--model", metavar="FILE", help="Model file (.m). [default: the small embedded model]")
@click.option("--tokenizer", metavar="FILE", help="Its tokenizer: .t, tokenizer.model or llama2.c tokenizer.bin.")
@click.option(
    "--context",
    type=click.IntRange(min=2),
    metavar="N",
    help=f"Tokens that the model sees at a time. [default: {DEFAULT_CONTEXT}, or the model's own if that is less]",
)
@click.option("--nthreads", type=click.IntRange(1, 256), metavar="N", help="Threads. [default: one for each core]")
def imatrix(path, output, force, model, tokenizer, context, nthreads) -> None:
    """Record an importance matrix: which columns of a model's matrices a text uses most.

    dllama-convert's --imatrix then writes Q40 weights that are closest where it matters. The text should be like what
    the model is for, some ten thousand tokens of it, and more for a mixture of experts: of each expert only the tokens
    tell that choose it. The model is best one of F16 or Q80 weights, and the importance matrix serves every conversion
    of the same checkpoint.

    \b
      dllama imatrix --model model-q80.m --tokenizer tokenizer.t --file text.txt -o model.imatrix
      dllama-convert hf ./checkpoint --imatrix model.imatrix -o model-q40.m
    """
    if (model is None) != (tokenizer is None):
        raise click.UsageError("--model and --tokenizer come together: give both, or neither for the embedded model")
    if os.path.exists(output) and not force:
        raise FileError(output, "exists already (--force replaces it)")
    AtomicFile(output, 0).abort()  # a path that cannot be written fails now, not after the run
    text = read_text(path)
    with open_model_file(model) as file:
        context = context or min(DEFAULT_CONTEXT, file.config.seq_len)
        if context > file.config.seq_len:
            raise ModelError(f"{file.path}: --context {context} is beyond the model's own, {file.config.seq_len}")
        windows = _windows(_tokenizer(tokenizer, file), text, context)
        if not windows:
            raise PromptError(f"{path}: no text to record")
        matrix = _record(file, windows, nthreads)
    write_imatrix(output, matrix)
    click.echo(f"{output}: {len(matrix.means)} matrices of {file.path.name}, over {matrix.tokens:,} tokens")


def _tokenizer(path: str | None, model: ModelFile) -> Tokenizer:
    """The tokenizer that goes with the model."""
    from dllama.embedded import tokenizer_path

    tokenizer = load_tokenizer(path or tokenizer_path())
    if tokenizer.vocab_size != model.config.vocab_size:
        raise ModelError(
            f"{path}: the tokenizer has {tokenizer.vocab_size} tokens and {model.path} has {model.config.vocab_size}: "
            "they do not belong together"
        )
    return tokenizer


def _windows(tokenizer: Tokenizer, text: str, context: int) -> list[list[int]]:
    """The text's tokens, at most `context` at a time, each time after the bos token where the tokenizer puts one."""
    tokens, head = tokenizer.encode(text, bos=False), tokenizer.encode("")
    size = context - len(head)
    return [head + tokens[start : start + size] for start in range(0, len(tokens), size)]


def _record(model: ModelFile, windows: list[list[int]], nthreads: int | None) -> ImportanceMatrix:
    from dllama.cluster.digest import model_digest
    from dllama.engine import memory
    from dllama.engine.compiling import compiling
    from dllama.engine.imatrix import Recorder
    from dllama.kernels import tags
    from dllama.kernels.team import Team, usable_cpus

    context = max(map(len, windows))
    memory.require(model.config, context, FloatType.F16, model.path)
    team = Team(nthreads or usable_cpus())
    try:
        notify = partial(click.echo, err=True)
        with compiling(model.config, FloatType.Q80, FloatType.F16, notify):
            recorder = Recorder(model, team, tags.Q80, tags.F16, context)
        with click.progressbar(windows, label="windows", file=sys.stderr) as progress:
            for window in progress:
                recorder.record(window)
    finally:
        team.close()
    return ImportanceMatrix(model_digest(model).hex(), recorder.tokens, recorder.means())
