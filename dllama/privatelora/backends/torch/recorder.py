"""Steps of a batch of a fixed shape that are recorded once and then repeated: as CUDA graphs where there is CUDA."""

from __future__ import annotations

from collections.abc import Callable, Hashable

import torch

MOST_RECORDED = 4096
"""Of these a model of 80 layers needs about 2000 for eight shapes of batches, stopping at q, k and v."""


class Recorder:
    """Runs functions that only read and write tensors which never move, and are the same function for a key.

    A graph's own memory holds nothing that outlives a run of it, so that all of them share it.
    """

    def __init__(self, device: torch.device):
        self._recorded: dict[Hashable, Callable[[], None]] = {}
        self._cuda = device.type == "cuda"
        self._memory = torch.cuda.graph_pool_handle() if self._cuda else None

    def run(self, key: Hashable | None, function: Callable[[], None]) -> None:
        """``key``: None for what is not to be recorded. On the CPU it is the function itself that is kept: what would
        not do as a graph gives wrong values there too."""
        recorded = self._recorded.get(key)
        if recorded is not None:
            recorded()
            return
        function()  # also loads the libraries that it needs, which a capture must not
        if key is not None:
            if len(self._recorded) >= MOST_RECORDED:
                self.forget()
            self._recorded[key] = self._captured(function)

    def forget(self) -> None:
        """Tensors have moved, or gone."""
        if self._cuda:
            torch.cuda.synchronize()
            self._memory = torch.cuda.graph_pool_handle()  # one that its last graph has left cannot be used again
        self._recorded.clear()

    def _captured(self, function: Callable[[], None]) -> Callable[[], None]:
        if not self._cuda:
            return function
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=self._memory, capture_error_mode="thread_local"):
            function()
        return graph.replay
