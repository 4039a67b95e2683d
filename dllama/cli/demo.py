"""`dllama demo`: what the project can do, on this machine and with what comes along."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from dllama.cli.live import Live
from dllama.cli.progress import Progress
from dllama.cli.report import visible

if TYPE_CHECKING:
    from dllama import Llama
    from dllama.demo.asking import Answer
    from dllama.demo.figures import Figures

SHOWN = "facts", "skill"
"""What is printed question by question."""

COLUMN = 26


@click.group()
def demo() -> None:
    """Show what this program can do. Needs nothing but itself."""


@demo.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON: every answer, and the figures.")
def privatelora(as_json) -> None:
    """Ask a model for private facts that only the edge has learnt.

    A second process on this machine is the cloud, which works the layers of the small model that comes along. This
    process is the edge: it has the tokenizer, the embedding, the output matrix, the sampler, and the matrices M that
    taught it fifty facts of a household (made up) and to spell numbers. The base model alone is asked the same.

    The cloud is sent no text, no token and no M. Its owner could still work out the text, the answer and M from what it
    is sent: dllama/privatelora/README.md says how, and how little helps.

    \b
      dllama demo privatelora
      dllama demo privatelora --json > answers.json
    """
    from dllama.demo.asking import ask
    from dllama.demo.facts import QUESTIONS

    progress = Progress(Live(), lambda line: click.echo(f"🔔 {visible(line)}", err=True))
    questions = [(kind, question) for kind, ask_for in QUESTIONS.items() for question in ask_for()]
    base, edge = ({kind: [] for kind in QUESTIONS} for _ in range(2))
    with _base_and_edge(progress) as models:
        with click.progressbar(questions, label="questions", file=sys.stderr) as asked:
            for kind, question in asked:
                for llama, answers in zip(models, (base, edge), strict=True):
                    answers[kind] += ask(llama, [question])
    click.echo(_json(base, edge) if as_json else _table(base, edge))


@contextmanager
def _base_and_edge(progress: Progress) -> Iterator[tuple[Llama, Llama]]:
    """The embedded model on this machine alone, and as the edge of a cloud that runs as long as the block."""
    from dllama import Llama
    from dllama.cluster.local import local_cloud
    from dllama.demo.shipped import EDGE_PATH
    from dllama.embedded import model_path
    from dllama.kernels.team import usable_cpus
    from dllama.privatelora.settings import EdgeSettings

    threads = max(1, usable_cpus() // 2)
    options = {"nthreads": threads, "notify": progress.say, "progress": progress}
    try:
        with local_cloud(model_path(), threads, notify=progress.say) as cloud:
            private = EdgeSettings(cloud.workers[0], cloud.key, EDGE_PATH)
            with Llama(**options) as base, Llama(**options, private=private) as edge:
                progress.end()
                yield base, edge
    finally:
        progress.end()


Answers = Mapping[str, Sequence["Answer"]]
"""Of one model, by kind of question."""


def _table(base: Answers, edge: Answers) -> str:
    """Every question with both answers, then the figures."""
    rows = [_row("", "base", "base + edge")]
    for kind in SHOWN:
        for one, other in zip(base[kind], edge[kind], strict=True):
            question = one.question.prompt.removeprefix("Question: ").partition("\n")[0]
            rows.append(_row(question, one.text, f"{other.text} {'✓' if other.is_right else '✗'}"))
    return "\n".join([*rows, "", *_totals(base, edge)])


def _totals(base: Answers, edge: Answers) -> Iterator[str]:
    yield _row("", "base", "base + edge")
    for kind in base:
        yield _row(f"{kind}, right", *(_right(_figures(answers[kind])) for answers in (base, edge)))
    of_all = [_figures([answer for kind in answers.values() for answer in kind]) for answers in (base, edge)]
    lines: dict[str, Callable[[Figures], str]] = {
        "tokens per second": lambda figures: f"{figures.tokens_per_second:.0f}",
        "to the cloud, per token": lambda figures: f"{figures.sent_bytes:,.0f} B",
        "from the cloud, per token": lambda figures: f"{figures.received_bytes:,.0f} B",
        "lost to the network, per token": lambda figures: f"{figures.network_ms:.2f} ms",
    }
    for name, write in lines.items():
        yield _row(name, *map(write, of_all))


def _right(figures: Figures) -> str:
    return f"{figures.right} of {figures.asked}"


def _figures(answers: Sequence[Answer]) -> Figures:
    from dllama.demo.figures import figures

    return figures(answers)


def _row(first: str, *cells: str) -> str:
    shown = [visible(cell) for cell in cells]
    cut = [cell if len(cell) <= COLUMN else f"{cell[: COLUMN - 1]}…" for cell in shown]
    return f"{first:<44}  " + "  ".join(f"{cell:<{COLUMN}}" for cell in cut).rstrip()


def _json(base: Answers, edge: Answers) -> str:
    values = {
        kind: {
            "questions": [
                {"prompt": one.question.prompt, "expected": one.question.answer, "base": one.text, "edge": other.text}
                for one, other in zip(base[kind], edge[kind], strict=True)
            ],
            "base": asdict(_figures(base[kind])),
            "edge": asdict(_figures(edge[kind])),
        }
        for kind in base
    }
    return json.dumps(values, indent=2)
