"""What a model's answers come to: how many are right, and what their tokens cost."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from dllama.demo.asking import Answer


@dataclass(frozen=True)
class Figures:
    """right: answers, of those ``asked``. The rest is of every token but the first of each answer, which comes with the
    prompt; there has to be one.

    tokens_per_second: that is generated;  sent_bytes, received_bytes: by the edge, for a token
    network_ms: of a token, while it was away and the cloud not at work on it
    """

    right: int
    asked: int
    tokens_per_second: float
    sent_bytes: float
    received_bytes: float
    network_ms: float


def figures(answers: Sequence[Answer]) -> Figures:
    """The averages over some answers of one model."""
    pieces = [piece for answer in answers for piece in answer.pieces[1:]]
    return Figures(
        right=sum(answer.is_right for answer in answers),
        asked=len(answers),
        tokens_per_second=1e3 / fmean(piece.generation_ms for piece in pieces),
        sent_bytes=fmean(piece.sent_bytes for piece in pieces),
        received_bytes=fmean(piece.received_bytes for piece in pieces),
        network_ms=fmean(sum(node.transfer_ms for node in piece.nodes[1:]) for piece in pieces),
    )
