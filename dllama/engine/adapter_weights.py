"""Adapters' matrices in memory, as the compiled stages see them: see `adapters`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np

from dllama.engine.pages import anonymous
from dllama.engine.stages import LOW_RANK
from dllama.engine.weights import Source, padded
from dllama.formats import ModelConfig, TensorInfo
from dllama.lora import LoraAdapter
from dllama.targets import DENSE, TARGETS

NUMBERS = {name: number for number, name in enumerate(TARGETS)}


def ranks_of(adapters: Sequence[LoraAdapter], config: ModelConfig) -> np.ndarray:
    """int64 [adapters, layers, targets]: rows of A, 0 where an adapter adds nothing."""
    ranks = np.zeros((len(adapters), config.n_layers, len(TARGETS)), np.int64)
    for number, adapter in enumerate(adapters):
        for (layer, target), (a, _) in adapter.matrices.items():
            ranks[number, layer, NUMBERS[target]] = len(a)
    return ranks


def values_of(
    adapters: Sequence[LoraAdapter], config: ModelConfig, slices: Mapping[str, tuple[range, range]] | None = None
) -> Iterator[np.ndarray]:
    """Their matrices in the order of ``AdapterWeights``: float32, A [rank, inputs] and then B transposed and times the
    scale, [rank, outputs], padded. ``slices``: rows and columns that a node has of each kind of the model's matrices.

    A node adds what its own rows of B and columns of A give: its part of the sum, as of the model's own products.
    """
    for adapter in adapters:
        for layer in range(config.n_layers):
            for target, names in TARGETS.items():
                if (layer, target) in adapter.matrices:
                    a, b = adapter.a(layer, target), adapter.b_in_model(layer, target, config)
                    if slices is not None:
                        rows, columns = slices[names.matrix]
                        a, b = a[:, columns.start : columns.stop], b[rows.start : rows.stop]
                    yield np.ascontiguousarray(a)
                    out = np.zeros((b.shape[1], padded(len(b))), np.float32)
                    np.multiply(b.T, np.float32(adapter.scale(layer, target)), out=out[:, : len(b)])
                    yield out


def lay_out(ranks: np.ndarray, config: ModelConfig, info: Callable[[str, int], TensorInfo]) -> tuple[np.ndarray, int]:
    """``LOW_RANK`` records [adapters, layers, targets] with offsets in place of addresses, and the bytes in all.

    ranks: as of ``ranks_of``;  info: tells the shapes of the model's matrices, or of a node's slices of them
    """
    records = np.zeros(ranks.shape, LOW_RANK)
    records["a_rank"] = records["b_rank"] = ranks
    for number, (name, names) in enumerate(TARGETS.items()):
        if not (config.arch.has_experts and name in DENSE):
            matrix = info(names.matrix, 0)
            records["inputs"][..., number], records["outputs"][..., number] = matrix.columns, matrix.rows
    a_bytes = 4 * ranks * records["inputs"]
    sizes = a_bytes + 4 * ranks * padded(records["outputs"])
    ends = sizes.cumsum().reshape(ranks.shape)
    records["a"] = ends - sizes
    records["b"] = records["a"] + a_bytes
    return records, int(ends[-1, -1, -1])


class AdapterWeights:
    """Room for the matrices of adapters in one block of memory, adapter by adapter, layer by layer, target by target.

    ranks: as of ``ranks_of``;  source: the model that they are for, or a slice of it, which has the widths

    records: ``LOW_RANK`` records [adapters, layers, targets], which say where the matrices are
    """

    def __init__(self, ranks: np.ndarray, source: Source):
        self.records, self.nbytes = lay_out(ranks, source.config, source.info)
        self._memory = anonymous(self.nbytes, huge=True)
        for matrix in ("a", "b"):
            self.records[matrix] += self._memory.ctypes.data

    @property
    def max_rank(self) -> int:
        return int(self.records["a_rank"].max())

    def fill(self, values: Iterable[np.ndarray]) -> None:
        """Takes the matrices, as of ``values_of``, or their bytes in pieces."""
        done = 0
        for matrix in values:
            self._memory[done : done + matrix.nbytes] = matrix.reshape(-1).view(np.uint8)
            done += matrix.nbytes
