"""M·A·x: what the edge makes of the values that the cloud sends at each stop."""

from __future__ import annotations

import numpy as np

from dllama.engine.weights import padded
from dllama.engine.workspace import MAX_ROWS
from dllama.formats import FloatType
from dllama.kernels import tags
from dllama.kernels.answer import answer
from dllama.kernels.jit import compiled
from dllama.kernels.reply import STOP
from dllama.privatelora.adapter import EdgeAdapter
from dllama.privatelora.passage import Stop, stops, targets_of
from dllama.privatelora.travel import Rows

BEYOND = 16
"""Floats behind each buffer that the kernels may read."""


class Answers:
    """All M of an adapter for some layers, and room for the answers; not for several threads."""

    def __init__(self, adapter: EdgeAdapter, layers: range, form: FloatType):
        self._shape = shape = adapter.shape
        self.tag, self.ranks = tags.BY_NAME[form.name.lower()], (shape.r_c2d, shape.r_d2c)
        self._m: dict[Stop, np.ndarray] = {}
        self._rows: dict[int, tuple[int, Rows, Rows]] = {}
        for stop in stops(shape, layers):
            targets = targets_of(shape, stop.product)
            values = np.zeros(len(targets) * shape.r_d2c * shape.r_c2d + BEYOND, np.float32)
            values[:-BEYOND] = np.concatenate([adapter.m(stop.layer, target).ravel() for target in targets])
            self._m[stop] = values
            widths = len(targets) * shape.r_c2d, len(targets) * shape.r_d2c
            self._rows[stop.product] = len(targets), *(Rows(form, width) for width in widths)
        most = 3 * max(shape.r_c2d, shape.r_d2c)
        self._answer = compiled(answer, self.tag, np.zeros(1, np.int64), *[0] * 10)
        self._x, self._y = (np.zeros(MAX_ROWS * padded(most) + BEYOND, np.float32) for _ in range(2))

    @property
    def stops(self) -> list[Stop]:
        """Where there is something to answer, in order."""
        return list(self._m)

    @property
    def records(self) -> np.ndarray:
        """The stops as `reply` sees them."""
        rows = []
        for stop, m in self._m.items():
            targets, into, out_of = self._rows[stop.product]
            rows.append((*stop, targets, m.ctypes.data, 4 * padded(into.width), 4 * padded(out_of.width)))
        return np.array(rows, STOP)

    @property
    def buffers(self) -> tuple[int, int]:
        """Addresses of the room for A·x and for the answers, of MAX_ROWS rows."""
        return self._x.ctypes.data, self._y.ctypes.data

    @property
    def most_bytes(self) -> int:
        """Of a row of an answer."""
        return max((out_of.row_bytes for _, _, out_of in self._rows.values()), default=0)

    def __call__(self, stop: Stop, payload, rows: int) -> np.ndarray:
        """The answer's bytes, uint8, for the bytes of A·x of so many rows. ValueError where they are not as many, not
        finite, or of a stop without an adapter."""
        if stop not in self._m:
            raise ValueError(f"product {stop.product} of layer {stop.layer}, which has no adapter")
        targets, into, out_of = self._rows[stop.product]
        data = np.frombuffer(payload, np.uint8)
        if len(data) != rows * into.row_bytes:
            raise ValueError(f"{len(data)} bytes for {rows} rows of {into.row_bytes} bytes")
        out = np.empty(rows * out_of.row_bytes, np.uint8)
        x_stride, y_stride = 4 * padded(into.width), 4 * padded(out_of.width)
        for first in range(0, rows, MAX_ROWS):
            some = min(MAX_ROWS, rows - first)
            self._y[: some * padded(out_of.width)] = 0
            source, target = data.ctypes.data + first * into.row_bytes, out.ctypes.data + first * out_of.row_bytes
            if not self._answer(
                into.tag, np.array([source]), some, targets, self._shape.r_c2d, self._shape.r_d2c,
                self._m[stop].ctypes.data, self._x.ctypes.data, x_stride, self._y.ctypes.data, y_stride, target,
            ):  # fmt: skip
                raise ValueError("a value that is infinite or no number")
        return out
