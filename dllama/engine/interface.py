"""What generation asks of whatever runs the model: this machine alone, or a cluster of which it is the root."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

from dllama.engine.adapters import NO_ADAPTER
from dllama.engine.candidates import Candidates, Reduction
from dllama.formats import ModelConfig


class Row(NamedTuple):
    """A token at its place. ``sequence`` is what the engine gave for it."""

    sequence: Any
    position: int
    token: int


@dataclass(frozen=True)
class NodeCost:
    """What one step cost one node: time at work and in exchanges, bytes of its messages."""

    name: str
    inference_ms: float
    transfer_ms: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0


class Engine(Protocol):
    """Runs rows of tokens.

    config: the model's;  context: positions that a sequence has room for;  most_rows: of a step;  cost: of the last
    step, for each node, the one that generates first
    """

    config: ModelConfig
    context: int
    most_rows: int
    cost: tuple[NodeCost, ...]

    def sequence(self, adapter: int = NO_ADAPTER) -> Any:
        """An empty sequence. What it takes is freed with it. ``adapter``: a number, in the order that they were given
        to the engine; rows of any sequences may share a step."""

    def step(self, rows: Sequence[Row], wanted: Sequence[int], reduction: Reduction) -> list[Candidates]:
        """Candidates for what follows each of the rows numbered in ``wanted``.

        At most ``most_rows`` rows. Each sequence's rows come in order of position and leave no gap to what it holds.
        """

    def close(self) -> None:
        """Lets go of everything."""
