"""What computes the cloud's layers: numba's kernels on the CPU, or torch where there is a GPU."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from dllama.errors import DllamaError
from dllama.formats import ModelConfig
from dllama.privatelora.adapter import CloudAdapter
from dllama.privatelora.passage import Passage, Stop
from dllama.privatelora.short_way import EdgeTalk, ShortWay


class Restarted(DllamaError):
    """The backend has lost part of itself, and with it all sequences, passages and adapters: why."""


class Backend(Protocol):
    """A decoder stack that stops for the edges. Anything may raise `Restarted`.

    config: the model's;  device: its name, for people;  has_short_ways: whether it has the last two of these methods
    """

    config: ModelConfig
    device: str
    has_short_ways: bool

    def prepare(self) -> None:
        """Before an edge's session: gets ready again what is not. From the thread that adapters come and go in."""

    def sequence(self, context: int) -> Any:
        """An empty sequence with room for so many positions. What it takes is freed with it."""

    def free_bytes(self) -> int | None:
        """Bytes that further sequences may take when those that are there are full; negative where these may take more
        than there is. None where the system does not say."""

    def sequence_bytes(self, context: int) -> int:
        """Bytes that it takes when it is full."""

    def add(self, adapter: CloudAdapter, layers: range) -> int:
        """The number of an adapter, loaded for these layers; it fits the model. From any thread."""

    def remove(self, number: int) -> None:
        """Frees an adapter."""

    def run(
        self,
        passages: Sequence[Passage],
        came_from: Stop | int,
        to: Stop,
        send: Callable[[Sequence[np.ndarray]], None],
    ) -> None:
        """Takes passages on to a stop, all of them from the same stop, or from the layer that they enter; together they
        have at most MAX_ROWS rows.

        ``send`` is called with their A·x, for each float32 [rows, targets of the product, r_c2d at least], all targets
        of the product whether adapted or not, before the product itself is begun.
        """

    def finish(self, passages: Sequence[Passage], came_from: Stop | int, layer: int) -> list[np.ndarray]:
        """Takes them on to the end, in front of a layer: the residual stream of each, float32 [rows, dim]."""

    def short_way(self, edges: Sequence[EdgeTalk]) -> ShortWay:
        """What takes passages of these edges past many stops in one call."""

    def go(self, passages: Sequence[Passage], came_from: Stop | int, way: ShortWay) -> None:
        """Takes passages, one of each edge, on by their short way, which says how far they came."""
