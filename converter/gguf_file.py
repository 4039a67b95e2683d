"""GGUF, llama.cpp's file of a model: metadata, a list of tensors, then their data.

Version 3, little-endian (https://github.com/ggml-org/ggml/blob/master/docs/gguf.md)::

    "GGUF", uint32 version, uint64 tensors, uint64 pairs of metadata
    each pair:    string key, uint32 type, value
    each tensor:  string name, uint32 dimensions, uint64 each (the row's length first), uint32 type, uint64 offset
    padding to the alignment, then the tensors, each at its offset from here, padded likewise

A string is a uint64 length and UTF-8 bytes; an array is a uint32 type, a uint64 count and the values.
"""

import math
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from dllama.errors import FormatError
from dllama.formats.files import open_regular

MAGIC = b"GGUF"
VERSIONS = (2, 3)
ALIGNMENT = 32
MAX_DIMENSIONS = 4
MAX_DEPTH = 4  # of arrays in arrays

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
NUMBERS = {U8: "<u1", I8: "<i1", U16: "<u2", I16: "<i2", U32: "<u4", I32: "<i4", F32: "<f4", BOOL: "<u1", U64: "<u8",
           I64: "<i8", F64: "<f8"}  # fmt: skip

TYPES = {
    0: ("F32", 1, 4), 1: ("F16", 1, 2), 30: ("BF16", 1, 2),
    2: ("Q4_0", 32, 18), 3: ("Q4_1", 32, 20), 6: ("Q5_0", 32, 22), 7: ("Q5_1", 32, 24), 8: ("Q8_0", 32, 34),
    10: ("Q2_K", 256, 84), 11: ("Q3_K", 256, 110), 12: ("Q4_K", 256, 144), 13: ("Q5_K", 256, 176),
    14: ("Q6_K", 256, 210), 16: ("IQ2_XXS", 256, 66), 17: ("IQ2_XS", 256, 74), 18: ("IQ3_XXS", 256, 98),
    19: ("IQ1_S", 256, 50), 20: ("IQ4_NL", 32, 18), 21: ("IQ3_S", 256, 110), 22: ("IQ2_S", 256, 82),
    23: ("IQ4_XS", 256, 136), 29: ("IQ1_M", 256, 56), 39: ("MXFP4", 32, 17),
}  # fmt: skip
"""Number of a tensor type -> name, values of a block, bytes of a block."""

NOT_READ = {
    4: "Q4_2", 5: "Q4_3", 9: "Q8_1", 15: "Q8_K", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64", 31: "Q4_0_4_4",
    32: "Q4_0_4_8", 33: "Q4_0_8_8", 34: "TQ1_0", 35: "TQ2_0", 36: "IQ4_NL_4_4", 37: "IQ4_NL_4_8", 38: "IQ4_NL_8_8",
    40: "NVFP4",
}  # fmt: skip
"""Names of other types, for messages."""


@dataclass(frozen=True)
class Entry:
    """One tensor of a GGUF file: row-major, shape ``[rows, columns]`` as numpy has it."""

    name: str
    kind: int  # a key of TYPES
    shape: tuple[int, ...]
    offset: int  # from the start of the file when read, from that of the data when written

    @property
    def row_bytes(self) -> int:
        _, block, block_bytes = TYPES[self.kind]
        return self.shape[-1] // block * block_bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes


def is_gguf(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is a GGUF."""
    return head[:4] == MAGIC


def read_gguf(path: str | os.PathLike) -> tuple[dict, dict[str, Entry]]:
    """The metadata and the tensors of a GGUF file by name; FormatError where it is not a sound one.

    Metadata values are int, float, bool, str, numpy arrays of numbers, or lists. Nothing is believed that the file has
    no bytes for.
    """
    with open_regular(path) as file:
        nbytes = os.fstat(file.fileno()).st_size
        try:
            return _parse(_Cursor(file, nbytes), nbytes)
        except (ValueError, UnicodeDecodeError) as error:
            reason = "a string is not UTF-8" if isinstance(error, UnicodeDecodeError) else str(error)
            raise FormatError(Path(path), reason) from None


class _Cursor:
    """Reads a file's parts one after another, never beyond its end."""

    def __init__(self, file: BinaryIO, nbytes: int):
        self._file, self.left = file, nbytes

    def read(self, count: int, what: str) -> bytes:
        if count > self.left:
            raise ValueError(f"truncated or damaged: {what} of {count:,} bytes, {self.left:,} are left")
        self.left -= count
        return self._file.read(count)

    def integer(self, code: str, what: str) -> int:
        return struct.unpack("<" + code, self.read(struct.calcsize(code), what))[0]

    def string(self, what: str) -> str:
        return self.read(self.integer("Q", what), what).decode()

    def value(self, kind: int, key: str, depth: int = 0):
        if kind == STRING:
            return self.string(key)
        if kind == ARRAY:
            item, count = self.integer("I", key), self.integer("Q", key)
            if item in NUMBERS:
                numbers = np.dtype(NUMBERS[item])
                return np.frombuffer(self.read(count * numbers.itemsize, key), numbers)
            if item not in (STRING, ARRAY) or depth == MAX_DEPTH:
                raise ValueError(f"{key} is an array of type {item}, which is not known")
            if 8 * count > self.left:
                raise ValueError(f"truncated or damaged: {key} has {count:,} values, {self.left:,} bytes are left")
            return [self.value(item, key, depth + 1) for _ in range(count)]
        if kind not in NUMBERS:
            raise ValueError(f"{key} is of type {kind}, which is not known")
        value = np.frombuffer(self.read(np.dtype(NUMBERS[kind]).itemsize, key), NUMBERS[kind])[0].item()
        return bool(value) if kind == BOOL else value


def _parse(cursor: _Cursor, nbytes: int) -> tuple[dict, dict[str, Entry]]:
    if nbytes < 24 or cursor.read(4, "magic") != MAGIC:
        raise ValueError("not a GGUF file")
    version = cursor.integer("I", "version")
    if version not in VERSIONS:
        swapped = " (a big-endian file)" if int.from_bytes(version.to_bytes(4, "little"), "big") in VERSIONS else ""
        raise ValueError(f"GGUF version {version} is not known (known: 2 and 3){swapped}")
    n_tensors, n_pairs = cursor.integer("Q", "count"), cursor.integer("Q", "count")
    for count, least, what in ((n_tensors, 24, "tensors"), (n_pairs, 13, "pairs of metadata")):
        if count * least > cursor.left:
            raise ValueError(f"truncated or damaged: {count:,} {what} do not fit in {nbytes:,} bytes")
    metadata: dict = {}
    for _ in range(n_pairs):
        key = cursor.string("a key")
        if key in metadata:
            raise ValueError(f"key {key} appears twice")
        metadata[key] = cursor.value(cursor.integer("I", key), key)
    entries = [_entry(cursor) for _ in range(n_tensors)]

    alignment = metadata.get("general.alignment", ALIGNMENT)
    if type(alignment) is not int or not 1 <= alignment <= 1 << 20:
        raise ValueError(f"general.alignment is {alignment!r}")
    start = _aligned(nbytes - cursor.left, alignment)
    tensors: dict[str, Entry] = {}
    for entry in entries:
        if entry.name in tensors:
            raise ValueError(f"tensor {entry.name} appears twice")
        end = start + entry.offset + entry.nbytes
        if end > nbytes:
            raise ValueError(f"truncated: tensor {entry.name} ends at byte {end:,}, the file at {nbytes:,}")
        tensors[entry.name] = Entry(entry.name, entry.kind, entry.shape, start + entry.offset)
    return metadata, tensors


def _entry(cursor: _Cursor) -> Entry:
    name = cursor.string("a tensor's name")
    what = f"tensor {name}"
    n_dimensions = cursor.integer("I", what)
    if not 1 <= n_dimensions <= MAX_DIMENSIONS:
        raise ValueError(f"{what} has {n_dimensions} dimensions")
    shape = tuple(cursor.integer("Q", what) for _ in range(n_dimensions))[::-1]
    kind, offset = cursor.integer("I", what), cursor.integer("Q", what)
    if kind not in TYPES:
        known = ", ".join(name for name, _, _ in TYPES.values())
        raise ValueError(f"{what} is of type {NOT_READ.get(kind, kind)}, which is not read (known: {known})")
    if shape[-1] % TYPES[kind][1]:
        raise ValueError(f"{what} has rows of {shape[-1]} values, which {TYPES[kind][0]} blocks do not fill")
    return Entry(name, kind, shape, offset)


def header_bytes(metadata: dict[str, tuple], shapes: Iterable[tuple[str, int, tuple[int, ...]]]) -> tuple[bytes, int]:
    """All of a GGUF file up to the tensors' data, with its padding, and the size of the data.

    metadata: key -> (type, value), or (ARRAY, type, values)
    shapes: name, type and shape of each tensor, in the order that they will be written in, each padded to ALIGNMENT
    """
    tensors, offset = [], 0
    for name, kind, shape in shapes:
        entry = Entry(name, kind, shape, offset)
        dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape[::-1])
        tensors.append(_string(name) + dimensions + struct.pack("<IQ", kind, offset))
        offset = _aligned(offset + entry.nbytes, ALIGNMENT)
    pairs = [_string(key) + struct.pack("<I", value[0]) + _value(*value) for key, value in metadata.items()]
    head = MAGIC + struct.pack("<IQQ", 3, len(tensors), len(pairs)) + b"".join(pairs) + b"".join(tensors)
    return head + padding(len(head)), offset


def padding(nbytes: int) -> bytes:
    """What follows ``nbytes`` bytes up to the alignment."""
    return bytes(_aligned(nbytes, ALIGNMENT) - nbytes)


def _value(kind: int, *value) -> bytes:
    if kind == STRING:
        return _string(value[0])
    if kind == ARRAY:
        item, values = value
        head = struct.pack("<IQ", item, len(values))
        if item == STRING:
            return head + b"".join(map(_string, values))
        return head + np.asarray(values, NUMBERS[item]).tobytes()
    return np.array(value[0], NUMBERS[kind]).tobytes()


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _aligned(offset: int, alignment: int) -> int:
    return -(-offset // alignment) * alignment
