"""`dllama inference`: a prompt in, text out as it is generated."""

import secrets
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import fields

import click

from dllama.cli import report
from dllama.cli.edge_options import edge_options, edge_values
from dllama.cli.live import Live
from dllama.cli.node_options import SeveralValues
from dllama.cli.options import model_options, open_llama
from dllama.cli.plan import plan_values
from dllama.cli.program import INTERRUPTED
from dllama.cli.text import read_text
from dllama.cli.top import Top
from dllama.engine.sampler import SamplerSettings
from dllama.formats.files import AtomicFile


def _sampler_option(*names: str, metavar: str, help: str):
    default = getattr(SamplerSettings, names[-1])
    return click.option(*names, type=type(default), default=default, metavar=metavar, show_default=True, help=help)


SAMPLER_OPTIONS = (
    _sampler_option("--temperature", "temperature", metavar="T", help="0 is greedy: always the likeliest token."),
    _sampler_option("--topk", "--top-k", "top_k", metavar="K", help="Keep the K likeliest tokens; 0 keeps all."),
    _sampler_option(
        "--topp",
        "--top-p",
        "top_p",
        metavar="P",
        help="Keep the likeliest tokens, until their probabilities reach P together; 1 keeps all.",
    ),
    _sampler_option(
        "--minp", "--min-p", "min_p", metavar="P", help="Keep tokens at least P times as likely as the likeliest."
    ),
    _sampler_option(
        "--repeat-penalty",
        "repetition_penalty",
        metavar="X",
        help="Above 1, makes tokens that occurred lately less likely.",
    ),
    _sampler_option(
        "--repeat-window", "repetition_window", metavar="N", help="How many of the last tokens are penalised."
    ),
    click.option(
        "--seed",
        type=int,
        metavar="N",
        default=lambda: secrets.randbits(32),
        show_default="a new one",
        help="The same seed gives the same text.",
    ),
)


def sampler_options(command):
    """Give a command an option for each field of `SamplerSettings`, under the field's name."""
    for option in reversed(SAMPLER_OPTIONS):
        command = option(command)
    return command


def sampler_settings(options: dict) -> SamplerSettings:
    """The settings in the options, which are taken out of them. Raises click.UsageError for values without sense."""
    try:
        return SamplerSettings(**{field.name: options.pop(field.name) for field in fields(SamplerSettings)})
    except ValueError as error:
        raise click.UsageError(str(error)) from None


@click.command(cls=SeveralValues)
@click.option("--prompt", metavar="TEXT", help="Text to continue.")
@click.option("--prompt-file", metavar="FILE", help="Take it from a file; - is standard input.")
@click.option(
    "--steps",
    type=click.IntRange(min=1),
    default=256,
    show_default=True,
    metavar="N",
    help="Tokens to generate at most.",
)
@click.option(
    "--max-seq-len",
    type=click.IntRange(min=1),
    metavar="N",
    help="Context in tokens, prompt included; less takes less memory. [default: the model's own]",
)
@model_options
@click.option(
    "--adapter",
    metavar="PATH",
    help="Generate with this adapter beside the model: a LoRA's folder as PEFT writes it, or with --mode privatelora "
    "the edge's half of a PrivateLoRA adapter.",
)
@edge_options
@sampler_options
@click.option("--quiet", is_flag=True, help="Print the generated text alone.")
@click.option("--top", is_flag=True, help="Show a table of what each node does, kept up to date on a terminal.")
@click.option(
    "--stats",
    metavar="FILE",
    help="Write what was measured, token by token and node by node, as JSON; the first token's inference is "
    "prefill_ms.",
)
def inference(
    prompt, prompt_file, steps, max_seq_len, adapter, mode, edge_layers, transfer_float_type, noise, reconnect_timeout,
    quiet, top, stats, **options,
) -> None:  # fmt: skip
    """Generate text.

    \b
      dllama inference --prompt "Question:" --repeat-penalty 1.05
      dllama inference --model model.m --tokenizer tokenizer.t --prompt "Hello world" --steps 16 --nthreads 4
      cat question.txt | dllama inference --prompt-file - --quiet > answer.txt
      dllama inference --local-workers 2 --prompt "Question:" --repeat-penalty 1.05 --top --quiet
      dllama inference --workers 10.0.0.2 10.0.0.3:9999 --model model.m --tokenizer tokenizer.t --prompt "Hello world"
      dllama inference --mode privatelora --workers cloud --adapter edge.plora --prompt "Question:"

    For every token a line tells the time of its generation (G), of it inference (I) and transfer (T), the bytes sent
    (S) and received (R) between the nodes, and its text; averages follow. Ctrl-C stops and prints the averages so far.
    """
    settings = sampler_settings(options)
    edge = edge_values(mode, adapter, edge_layers, transfer_float_type, noise, reconnect_timeout)
    text = _prompt_text(prompt, prompt_file)
    if stats:
        AtomicFile(stats, 0).abort()  # a path that cannot be written fails now, not after the run

    live = Live()
    lora = None if edge else adapter
    adapters = {} if lora is None else {lora: lora}
    with open_llama(**options, context=max_seq_len, adapters=adapters, edge=edge, live=live) as llama:
        run = report.Run(text, llama.encode(text))
        if not quiet:
            click.echo(report.start_lines(llama, settings), err=True)
        with Top(live, llama, run.pieces) if top else nullcontext(live) as screen:
            pieces = llama.generate(run.prompt_ids, steps, settings, lora)
            status = _generate(llama, pieces, run, quiet, screen.write)
            if quiet and not run.text.endswith("\n"):
                screen.write("\n")
        if not quiet:
            click.echo(report.averages(run), nl=bool(run.pieces))
        if llama.stop_reason == "context":
            click.echo(f"stopped at the end of the context of {llama.context} tokens", err=True)
        if stats:
            plan = None if llama.plan is None else plan_values(llama.plan)
            report.write_statistics(stats, report.statistics(run, llama) | {"cluster": plan})
    click.get_current_context().exit(status)


def _generate(llama, pieces: Iterator, run: report.Run, quiet: bool, write: Callable[[str], None]) -> int:
    """Print and record the pieces of a text; returns the exit status. Ctrl-C ends it early."""
    try:
        for piece in pieces:
            if not run.pieces:
                run.prefill_ms = llama.prefill_ms
                if not quiet:
                    write(f"{report.prompt_line(run)}\n")
            run.pieces.append(piece)
            write(piece.text if quiet else f"{report.token_line(piece)}\n")
    except KeyboardInterrupt:
        return INTERRUPTED
    return 0


def _prompt_text(prompt: str | None, prompt_file: str | None) -> str:
    """The text to continue. The line break that ends a file is not part of it."""
    if (prompt is None) == (prompt_file is None):
        raise click.UsageError("give the text to continue with either --prompt or --prompt-file")
    if prompt_file is not None:
        prompt = read_text(prompt_file).removesuffix("\n").removesuffix("\r")
    return prompt
