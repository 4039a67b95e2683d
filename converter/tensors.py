"""Tensors that the model file wants in another form: parts to be joined, and rows of q and k in another order."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from dllama.formats import FloatType
from dllama.formats.rotary import interleave_pairs
from dllama.formats.tensor import Read, Tensor, read_bytes


@dataclass(frozen=True)
class Joined:
    """A matrix of which each shard of a checkpoint holds a part.

    axis: 0 where the parts are rows of the whole, one part after another; 1 where they are columns
    """

    parts: tuple[Tensor, ...]  # of one shape
    axis: int
    unit: ClassVar[int] = 1

    @property
    def name(self) -> str:
        return self.parts[0].name

    @property
    def path(self) -> Path:
        return self.parts[0].path

    @property
    def offset(self) -> int:
        return self.parts[0].offset

    @property
    def dtype(self) -> str:
        return self.parts[0].dtype

    @property
    def shape(self) -> tuple[int, ...]:
        rows, columns = self.parts[0].shape
        return (rows * len(self.parts), columns) if self.axis == 0 else (rows, columns * len(self.parts))

    def rows(self, start: int, stop: int, read: Read = read_bytes) -> np.ndarray:
        """Rows ``start`` to ``stop`` of the whole as float32 [stop - start, columns]."""
        return self._gather(start, stop, lambda part, first, last: part.rows(first, last, read))

    def raw(self, start: int, stop: int, read: Read = read_bytes) -> np.ndarray:
        """The same rows as the files store them: uint8 [stop - start, row_bytes]."""
        return self._gather(start, stop, lambda part, first, last: part.raw(first, last, read))

    def stored(self, start: int, stop: int, float_type: FloatType, read: Read = read_bytes) -> np.ndarray | None:
        """As ``Tensor.stored``, of the whole."""
        if self.dtype != float_type.name:
            return None
        return self._gather(start, stop, lambda part, first, last: part.stored(first, last, float_type, read))

    def _gather(self, start: int, stop: int, rows_of: Callable[[Tensor, int, int], np.ndarray]) -> np.ndarray:
        """Rows of the whole, from those that ``rows_of`` gives of a part."""
        if self.axis == 1:
            return np.concatenate([rows_of(part, start, stop) for part in self.parts], axis=1)
        height = self.parts[0].shape[0]
        found = []
        for i, part in enumerate(self.parts):
            first, last = max(start - i * height, 0), min(stop - i * height, height)
            if first < last:
                found.append(rows_of(part, first, last))
        return np.concatenate(found)


@dataclass(frozen=True)
class HalfSplit(Tensor):
    """Rows of q or k that lie in the order of rotary pairs (i, i + head_dim/2); they are read in that of (2i, 2i+1)."""

    head_dim: int

    @property
    def unit(self) -> int:
        return self.head_dim

    def raw(self, start: int, stop: int, read: Read = read_bytes) -> np.ndarray:
        """Rows ``start`` to ``stop``, whole heads, as the file stores them: uint8 [stop - start, row_bytes]."""
        return interleave_pairs(super().raw(start, stop, read), self.head_dim)
