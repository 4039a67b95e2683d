"""How much of what was taught a model answers right, without and with an adapter.

``python -m dllama.demo.score DIR`` asks all questions of the embedded model, alone and with the adapter in DIR, which
``dllama train privatelora`` wrote, with or without ``--lora``; no DIR is the adapter that ships.
"""

import tempfile
from collections.abc import Iterable
from pathlib import Path

import click

from dllama import Llama
from dllama.demo.asking import ask
from dllama.demo.facts import QUESTIONS
from dllama.demo.shipped import FOLDER, as_lora
from dllama.errors import DllamaError
from dllama.lora import CONFIG_FILE, read_lora, write_lora
from dllama.privatelora.adapter import CLOUD_FILE, EDGE_FILE, read_cloud, read_edge


def score(folder: Path) -> str:
    """A table: parameters trained, and right answers of each kind. Raises DllamaError for files that are no adapter."""
    with tempfile.TemporaryDirectory() as merged:
        if (folder / CONFIG_FILE).exists():
            n_trained = sum(a.size + b.size for a, b in read_lora(folder).matrices.values())
            merged = folder
        else:
            edge = read_edge(folder / EDGE_FILE)
            n_trained = edge.shape.n_trained
            write_lora(merged, as_lora(read_cloud(folder / CLOUD_FILE), edge), "the embedded model")
        with Llama(adapters={"adapter": merged}) as llama:
            rows = [("base", 0, None), ("base and adapter", n_trained, "adapter")]
            return "\n".join([_line("", "trained", QUESTIONS), *(_row(llama, *row) for row in rows)])


def _row(llama: Llama, name: str, n_trained: int, adapter: str | None) -> str:
    counts = []
    for questions in QUESTIONS.values():
        answers = list(ask(llama, questions(), adapter))
        counts.append(f"{sum(answer.is_right for answer in answers)} of {len(answers)}")
    return _line(name, f"{n_trained:,}", counts)


def _line(name: str, n_trained: str, cells: Iterable[str]) -> str:
    return f"{name:<16}{n_trained:>9}" + "".join(f"{cell:>22}" for cell in cells)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path), default=FOLDER)
def main(folder: Path) -> None:
    """Ask everything of the embedded model, alone and with the adapter in FOLDER."""
    try:
        click.echo(score(folder))
    except DllamaError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
