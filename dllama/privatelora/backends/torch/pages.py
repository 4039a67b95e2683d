"""Keys and values of all sequences on the device, in pages that sequences take as they grow."""

from __future__ import annotations

import weakref

import torch

from dllama.formats import ModelConfig

PAGE = 64
"""Positions of a page."""
GROWTH = 1.5
"""Of the pool when it is full: it is copied then, layer by layer."""


class Sequence:
    """The pages of one sequence, which go back to the pool with it.

    capacity: positions that it may have;  pages: their numbers, of as many positions as it has needed so far
    """

    def __init__(self, pool: Pool, capacity: int):
        self.capacity = capacity
        self.pages: list[int] = []
        weakref.finalize(self, pool.give_back, self.pages)


class Pool:
    """Pages of all layers.

    layers: a tensor [slots, 2, kv heads, head_dim] for each layer, keys and values; slot page·PAGE + i is position i of
    a page. Page 0 is nobody's: rows that only fill a batch up write there, and it stands for pages that a sequence has
    not. All that attention may read is finite: pages are zeroed when they are handed out.

    moves: how often the tensors have moved, since the pool had to grow
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        self.layers = [
            torch.zeros(PAGE, 2, config.n_kv_heads, config.head_dim, dtype=dtype, device=device)
            for _ in range(config.n_layers)
        ]
        self.page_bytes = sum(layer.nbytes for layer in self.layers)
        self._free: list[int] = []
        self._n_pages = 1
        self.moves = 0

    def nbytes(self, context: int) -> int:
        """Bytes of a full sequence."""
        return -(-context // PAGE) * self.page_bytes

    def free_bytes(self) -> int:
        """Of pages that nobody has."""
        return len(self._free) * self.page_bytes

    def reserve(self, wanted: dict[Sequence, int]) -> None:
        """Gives sequences the pages for so many positions."""
        missing = {sequence: -(-n // PAGE) - len(sequence.pages) for sequence, n in wanted.items()}
        needed = sum(n for n in missing.values() if n > 0)
        if needed > len(self._free):
            self._grow(max(needed - len(self._free), int((GROWTH - 1) * self._n_pages)))
        for sequence, n in missing.items():
            for _ in range(n):
                page = self._free.pop()
                for layer in self.layers:
                    layer[page * PAGE : (page + 1) * PAGE].zero_()
                sequence.pages.append(page)

    def give_back(self, pages: list[int]) -> None:
        """Pages that are free again. From any thread."""
        self._free.extend(pages)

    def _grow(self, more: int) -> None:
        slots, wanted = self._n_pages * PAGE, (self._n_pages + more) * PAGE
        self.moves += 1
        for i, old in enumerate(self.layers):
            if len(old) < wanted:  # else it grew when memory ran out for those after it
                self.layers[i] = old.new_empty(wanted, *old.shape[1:])
                self.layers[i][:slots].copy_(old[:slots])
        self._free.extend(range(self._n_pages, self._n_pages + more))
        self._n_pages += more
