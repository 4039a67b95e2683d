"""Rows of values that travel between machines: float32 to bytes and back; see `dllama.kernels.travel`."""

from __future__ import annotations

import numpy as np

from dllama.engine.weights import padded
from dllama.formats import FloatType
from dllama.kernels import tags
from dllama.kernels.jit import compiled
from dllama.kernels.travel import decode_sum, encode


class Rows:
    """Rows of ``width`` values in a form: F32, F16 or Q80."""

    def __init__(self, form: FloatType, width: int):
        self.width = width
        self.tag = tags.BY_NAME[form.name.lower()]
        self._encode = compiled(encode, self.tag, 0, 0, 0, 0, 0)
        self._decode = compiled(decode_sum, self.tag, np.zeros(1, np.int64), 0, 0, 0, 0)
        self.row_bytes = form.row_bytes(width if form is FloatType.F32 else padded(width))

    def encode(self, x: np.ndarray) -> np.ndarray:
        """float32 [rows, width] as bytes, uint8."""
        rows = np.zeros((len(x), padded(self.width)), np.float32)
        rows[:, : self.width] = x
        out = np.empty(len(x) * self.row_bytes, np.uint8)
        self._encode(self.tag, rows.ctypes.data, rows.strides[0], len(x), self.width, out.ctypes.data)
        return out

    def decode(self, payload, rows: int) -> np.ndarray:
        """The bytes of so many rows as float32 [rows, width]. ValueError where they are not as many."""
        data = np.frombuffer(payload, np.uint8)
        self.check(data, rows)
        x = np.zeros((rows, padded(self.width)), np.float32)
        self._decode(self.tag, np.array([data.ctypes.data]), x.ctypes.data, x.strides[0], rows, self.width)
        return x[:, : self.width]

    def check(self, data: np.ndarray, rows: int) -> None:
        """ValueError where these are not the bytes of so many rows."""
        if len(data) != rows * self.row_bytes:
            raise ValueError(f"{len(data)} bytes for {rows} rows of {self.row_bytes} bytes")
