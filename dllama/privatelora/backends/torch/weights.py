"""Matrices on the device: plain ones, and the file's Q40 and Q80 kept packed and unpacked in the product.

With CUDA and Triton the products of packed ones are kernels of our own, see `triton_products`. Elsewhere some rows of a
matrix at a time are unpacked to memory, and multiplied there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import numpy as np
import torch

from dllama.formats.blocks import BLOCK, FloatType, dequantize

TILE_VALUES = {"cuda": 1 << 24, "cpu": 1 << 19}
"""Values of a packed matrix that are unpacked at a time: on a CPU they stay in its cache, on a GPU launches are few."""
SIGNED = 0x88
"""What turns two nibbles that stand for q - 8 into nibbles of two's complement."""


class Scratch:
    """Room for some unpacked rows, which all products share.

    dtype: that of products
    """

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self.dtype = dtype
        self.n_values = TILE_VALUES[device.type]
        self._values = torch.empty(0, dtype=dtype, device=device)

    def reserve(self, columns: int) -> None:
        """Matrices of so many columns will be unpacked: there must be room for a row at least."""
        if self._values.numel() < max(columns, self.n_values):
            self._values = self._values.new_empty(max(columns, self.n_values))

    def rows(self, count: int, columns: int) -> torch.Tensor:
        """Unset [count, columns]."""
        return self._values[: count * columns].view(count, columns)


class Matrix(ABC):
    """A matrix [rows, columns] on the device, filled some rows at a time."""

    def __init__(self, rows: int, columns: int):
        self.rows, self.columns = rows, columns

    @abstractmethod
    def fill(self, start: int, raw: np.ndarray, float_type: FloatType) -> None:
        """Rows from ``start`` on, as a file has them: uint8 [some rows, row_bytes]."""

    @abstractmethod
    def product(self, x: torch.Tensor, out: torch.Tensor) -> None:
        """out = x·matrixᵀ;  x: [n, columns], out: [n, rows], both of the products' dtype"""


class Plain(Matrix):
    """Values of the products' dtype."""

    def __init__(self, rows: int, columns: int, dtype: torch.dtype, device: torch.device):
        super().__init__(rows, columns)
        self._values = torch.empty(rows, columns, dtype=dtype, device=device)

    def fill(self, start: int, raw: np.ndarray, float_type: FloatType) -> None:
        values = dequantize(raw, float_type, self.columns)
        self._values[start : start + len(raw)].copy_(torch.from_numpy(values))

    def product(self, x: torch.Tensor, out: torch.Tensor) -> None:
        torch.mm(x, self._values.t(), out=out)


class Packed(Matrix):
    """Blocks of 32 values: integers [rows, blocks, bytes], and a scale for each block [rows, blocks, 1].

    Scales are F16 as in the file, but for products in float32, which take them in that.
    """

    block_bytes: int

    def __init__(self, rows: int, columns: int, scratch: Scratch, device: torch.device):
        super().__init__(rows, columns)
        blocks = columns // BLOCK
        scale_type = torch.float32 if scratch.dtype is torch.float32 else torch.float16
        self._integers = torch.empty(rows, blocks, self.block_bytes, dtype=torch.int8, device=device)
        self._scales = torch.empty(rows, blocks, 1, dtype=scale_type, device=device)
        self._scratch = scratch
        self._product = _product_on(device)
        if self._product is None:
            scratch.reserve(columns)

    def fill(self, start: int, raw: np.ndarray, float_type: FloatType) -> None:
        blocks = raw.reshape(len(raw), self.columns // BLOCK, 2 + self.block_bytes)
        scales = np.ascontiguousarray(blocks[:, :, :2]).view("<f2").astype(np.float16)
        integers = self._to_signed(blocks[:, :, 2:])
        self._scales[start : start + len(raw)].copy_(torch.from_numpy(scales))
        self._integers[start : start + len(raw)].copy_(torch.from_numpy(integers))

    def product(self, x: torch.Tensor, out: torch.Tensor) -> None:
        if self._product is not None:
            self._product(x, self._integers, self._scales, out)
            return
        tile = max(1, self._scratch.n_values // self.columns)
        for start in range(0, self.rows, tile):
            integers, scales = self._integers[start : start + tile], self._scales[start : start + tile]
            values = self._scratch.rows(len(integers), self.columns)
            self._unpack(integers, scales, values)
            torch.mm(x, values.t(), out=out[:, start : start + tile])

    @abstractmethod
    def _to_signed(self, integers: np.ndarray) -> np.ndarray:
        """A file's bytes as this class holds them: int8 of the same shape."""

    @abstractmethod
    def _unpack(self, integers: torch.Tensor, scales: torch.Tensor, values: torch.Tensor) -> None:
        """values = integers·scales, for some rows"""


class PackedQ40(Packed):
    """Two values to a byte, in the file's order: values 0 to 15 of a block in the low nibbles, 16 to 31 in the high.

    Nibbles are two's complement here, so that a shift of int8 leaves a value's sign where it belongs.
    """

    block_bytes = BLOCK // 2

    def _to_signed(self, integers: np.ndarray) -> np.ndarray:
        return (integers ^ np.uint8(SIGNED)).view(np.int8)

    def _unpack(self, integers: torch.Tensor, scales: torch.Tensor, values: torch.Tensor) -> None:
        halves = values.view(*integers.shape[:2], 2, BLOCK // 2)
        torch.mul((integers << 4) >> 4, scales, out=halves[:, :, 0])
        torch.mul(integers >> 4, scales, out=halves[:, :, 1])


class PackedQ80(Packed):
    """A byte to a value, as in the file."""

    block_bytes = BLOCK

    def _to_signed(self, integers: np.ndarray) -> np.ndarray:
        return np.ascontiguousarray(integers).view(np.int8)

    def _unpack(self, integers: torch.Tensor, scales: torch.Tensor, values: torch.Tensor) -> None:
        torch.mul(integers, scales, out=values.view(integers.shape))


PACKED = {FloatType.Q40: PackedQ40, FloatType.Q80: PackedQ80}


def _product_on(device: torch.device) -> Callable | None:
    """The product with a packed matrix on a device, None where there is no Triton for it."""
    if device.type != "cuda":
        return None
    try:
        from dllama.privatelora.backends.torch.triton_products import product
    except ImportError:
        return None
    return product
