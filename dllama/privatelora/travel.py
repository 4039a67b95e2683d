"""Values between edge and cloud as they travel: rows of finite floats as Q80, F16 or F32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from dllama.engine import rows
from dllama.engine.weights import padded
from dllama.formats import FloatType
from dllama.kernels.jit import compiled
from dllama.kernels.stop import FINITE, LIMITS, pack, unpack


class Rows(rows.Rows):
    """As they are, but ValueError also for a value that is not finite, on both sides: Q80 would hide it."""

    def __init__(self, form: FloatType, width: int):
        super().__init__(form, width)
        self._largest = np.float32(LIMITS.get(self.tag, FINITE))

    def encode(self, x: np.ndarray) -> np.ndarray:
        if not np.isfinite(x).all():
            raise ValueError("a value that is infinite or no number")
        return super().encode(x)

    def decode(self, payload, rows: int) -> np.ndarray:
        x = super().decode(payload, rows)
        if not (abs(x) <= self._largest).all():
            raise ValueError("a value that is infinite or no number")
        return x


def prepare() -> None:
    """Compiles what travels at stops, in all forms: a cloud that did so when an edge comes could say nothing
    meanwhile."""
    for form in (FloatType.F32, FloatType.F16, FloatType.Q80):
        Targets(form, [0], 1, 1)


class Targets:
    """What travels at a stop: rows of ``rank`` values for some targets of a product. Not for several threads.

    picked: numbers of these targets among the product's ``count``
    """

    def __init__(self, form: FloatType, picked: Sequence[int], count: int, rank: int):
        self._rows = Rows(form, len(picked) * rank)
        self._count, self._rank = count, rank
        self._tag, self._row_bytes = self._rows.tag, self._rows.row_bytes
        self._with = np.array(picked, np.int64), rank, np.zeros(padded(self._rows.width), np.float32)
        values = np.zeros((2, 2, 2), np.float32)[:, :, :1]
        self._pack = compiled(pack, self._tag, values, *self._with, np.empty(0, np.uint8))
        self._unpack = compiled(unpack, self._tag, 0, values, *self._with)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """float32 [rows, count, rank at least] as bytes, uint8. ValueError for a value that is not finite."""
        out = np.empty(len(values) * self._row_bytes, np.uint8)
        if not self._pack(self._tag, values, *self._with, out):
            raise ValueError("a value that is infinite or no number")
        return out

    def decode(self, payload, rows: int) -> np.ndarray:
        """The bytes of so many rows as float32 [rows, count, rank], 0 for targets that are not picked. ValueError where
        they are not as many, and for a value that is not finite."""
        data = np.frombuffer(payload, np.uint8)
        self._rows.check(data, rows)
        values = np.zeros((rows, self._count, self._rank), np.float32)
        if not self._unpack(self._tag, data.ctypes.data, values, *self._with):
            raise ValueError("a value that is infinite or no number")
        return values
