"""Asking questions of a model: what it answers, and whether that is right."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dllama.demo.facts import Question
from dllama.engine.sampler import SamplerSettings

if TYPE_CHECKING:
    from dllama import Llama, Piece

ANSWER_TOKENS = 16
"""Longer than any answer that is right; a model that was not taught to stop would go on."""


@dataclass(frozen=True)
class Answer:
    """text: the first line of what the model wrote;  pieces: all of its tokens"""

    question: Question
    text: str
    pieces: list[Piece]

    @property
    def is_right(self) -> bool:
        """Whether it is the answer and nothing else."""
        return self.text == self.question.answer


def ask(llama: Llama, questions: Iterable[Question], adapter: str | None = None) -> Iterator[Answer]:
    """Greedy answers, one after the other; ``adapter``: as ``Llama.generate`` takes it."""
    for question in questions:
        pieces = list(llama.generate(question.prompt, ANSWER_TOKENS, SamplerSettings(temperature=0), adapter))
        text = "".join(piece.text for piece in pieces).strip().partition("\n")[0]
        yield Answer(question, text, pieces)
