"""A tensor that lies in a file, and its values read a few rows at a time.

Rows are read, not mapped: pages of a mapping would count as the program's memory, up to the whole checkpoint.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from dllama.errors import FileError, FormatError
from dllama.formats.blocks import FloatType
from dllama.formats.files import open_regular, reason

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
READABLE = ("F32", "F16", "BF16")

STEP = 1 << 16  # values converted at a time: the temporaries of one step stay in the L2 cache

Read = Callable[[Path, int, int], np.ndarray]
"""Path of a file, an offset in it and a count -> so many of its bytes, uint8 [count]."""


def read_bytes(path: Path, offset: int, count: int) -> np.ndarray:
    """``count`` bytes of a file from byte ``offset`` of it on, uint8 [count]. FileError where they cannot be read."""
    data = np.empty(count, np.uint8)
    with open_regular(path) as file:
        try:
            file.seek(offset)
            found = file.readinto(data)
        except OSError as error:
            raise FileError(path, f"cannot be read: {reason(error)}") from None
    if found != count:
        raise FileError(path, "became shorter while it was read")
    return data


@dataclass(frozen=True)
class Tensor:
    """A tensor whose values lie row after row in one file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file, in bytes
    unit: ClassVar[int] = 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, the values of the last dimension."""
        return self.shape[-1] * ITEM_BYTES[self.dtype]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEM_BYTES[self.dtype]

    def raw(self, start: int, stop: int, read: Read = read_bytes) -> np.ndarray:
        """Rows ``start`` to ``stop`` as they lie in the file: uint8 [stop - start, row_bytes]."""
        data = read(self.path, self.offset + start * self.row_bytes, (stop - start) * self.row_bytes)
        return data.reshape(stop - start, self.row_bytes)

    def rows(self, start: int, stop: int, read: Read = read_bytes) -> np.ndarray:
        """Rows ``start`` to ``stop`` as float32 [stop - start, columns], for a tensor of one or two dimensions."""
        return to_float32(self.raw(start, stop, read), self.dtype).reshape(stop - start, self.shape[-1])

    def values(self) -> np.ndarray:
        """The whole tensor as float32 of its shape. FormatError where it is of another dtype than those in READABLE, or
        not all of it is finite."""
        if self.dtype not in READABLE:
            raise FormatError(
                self.path, f"tensor {self.name} is {self.dtype}, which is not read (known: {', '.join(READABLE)})"
            )
        values = to_float32(self.read(0, self.nbytes), self.dtype).reshape(self.shape)
        if not np.isfinite(values).all():
            raise FormatError(self.path, f"tensor {self.name} has values that are not finite (NaN or infinity)")
        return values

    def stored(self, start: int, stop: int, float_type: FloatType, read: Read = read_bytes) -> np.ndarray | None:
        """The same rows as uint8 [stop - start, row_bytes] where they are of ``float_type``, else None; ValueError for
        values that are not finite."""
        if self.dtype != float_type.name:
            return None
        data = self.raw(start, stop, read)
        if not _is_finite(data.reshape(-1), self.dtype):
            raise ValueError("values that are not finite (NaN or infinity)")
        return data

    def read(self, begin: int, count: int) -> np.ndarray:
        """``count`` of the tensor's bytes as they are stored, from byte ``begin`` of it on: uint8 [count]."""
        return read_bytes(self.path, self.offset + begin, count)


def _is_finite(data: np.ndarray, dtype: str) -> bool:
    """Whether all numbers of F16 or F32 in ``data`` (uint8) are: infinities and NaN have an exponent of ones."""
    item, magnitude, infinity = {"F16": ("<u2", 0x7FFF, 0x7C00), "F32": ("<u4", 0x7FFFFFFF, 0x7F800000)}[dtype]
    numbers = data.view(item)
    steps = (numbers[start : start + STEP] for start in range(0, len(numbers), STEP))
    return all((step & numbers.dtype.type(magnitude)).max() < infinity for step in steps)


def to_float32(data: bytes | np.ndarray, dtype: str) -> np.ndarray:
    """The numbers in ``data`` (bytes, or uint8), of a dtype in READABLE, as float32 [n]."""
    if dtype == "F32":
        return np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False)
    halves = np.frombuffer(data, dtype="<u2")
    out = np.empty(len(halves), dtype=np.uint32)
    widen = _widen_bf16 if dtype == "BF16" else _widen_f16
    for start in range(0, len(halves), STEP):
        widen(halves[start : start + STEP], out[start : start + STEP])
    return out.view(np.float32)


def _widen_bf16(halves: np.ndarray, out: np.ndarray) -> None:
    """bfloat16 is the upper half of float32."""
    out[...] = halves
    out <<= 16


def _widen_f16(halves: np.ndarray, out: np.ndarray) -> None:
    """Several times as fast as numpy's own conversion.

    Exponent and fraction, moved up by the 13 bits that float32's fraction is longer, stand for the number times
    2^-112, as the exponents' biases are 15 and 127; denormals come out right too, infinities and NaN do not.
    """
    if halves.size and (halves & np.uint16(0x7FFF)).max() >= 0x7C00:
        out.view(np.float32)[...] = halves.view("<f2")
        return
    out.view(np.int32)[...] = halves.view("<i2")  # extends the sign, of which the highest bit stays
    out <<= 13
    out &= np.uint32(0x8FFFFFFF)
    numbers = out.view(np.float32)
    numbers *= np.float32(2.0**112)
