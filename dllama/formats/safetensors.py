"""Safetensors files: tensors and a few words about them, read lazily and written whole or not at all.

A file is ``uint64 header_bytes``, a JSON object of that length, then the tensors' bytes. The object maps a name to
``{"dtype", "shape", "data_offsets": [begin, end]}``, offsets counted from the end of the header; the tensors cover the
bytes without gaps or overlaps. Its ``__metadata__`` maps names to text
(https://github.com/huggingface/safetensors#format). Everything is checked on opening.
"""

import json
import math
import os
import struct
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from dllama.errors import FormatError
from dllama.formats.files import AtomicFile, open_regular
from dllama.formats.json_file import MAX_JSON_BYTES, parse_json
from dllama.formats.tensor import ITEM_BYTES, Tensor

METADATA = "__metadata__"
WRITTEN = {np.dtype("<f4"): "F32", np.dtype("<f2"): "F16"}
"""What can be written: dtype of an array -> its name in the file."""

LFS_POINTER = b"version https://git-lfs"
NOT_FETCHED = "a pointer of Git LFS, not the file itself: fetch it with 'git lfs pull'"


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Every tensor of one safetensors file by name, from its checked header."""
    return read_with_metadata(path)[0]


def read_with_metadata(path: str | os.PathLike) -> tuple[dict[str, Tensor], dict[str, str]]:
    """As ``read_safetensors``, and the file's metadata."""
    with open_regular(path) as file:
        nbytes = os.fstat(file.fileno()).st_size
        head = file.read(8)
        if head == LFS_POINTER[:8]:
            raise FormatError(path, NOT_FETCHED)
        if len(head) < 8:
            raise FormatError(path, f"not a safetensors file: {nbytes} bytes")
        header_bytes = struct.unpack("<Q", head)[0]
        if header_bytes > min(nbytes - 8, MAX_JSON_BYTES):
            raise FormatError(path, f"truncated or not a safetensors file: a header of {header_bytes:,} bytes")
        text = file.read(header_bytes)
    try:
        header = parse_json(text)
        metadata = _metadata(header.pop(METADATA, {}))
        return dict(_tensors(Path(path), header, 8 + header_bytes, nbytes)), metadata
    except ValueError as error:
        raise FormatError(path, str(error)) from None


def write_safetensors(path: str | os.PathLike, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str]) -> None:
    """Write float32 and float16 arrays in the order given. Raises FileError where the system refuses."""
    header: dict[str, dict] = {METADATA: dict(metadata)}
    end = 0
    for name, array in tensors.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": WRITTEN[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the first tensor lies at a multiple of 8
    with AtomicFile(path, 8 + len(text) + end) as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for array in tensors.values():
            file.write(np.ascontiguousarray(array))


def _metadata(values) -> dict[str, str]:
    if not isinstance(values, dict) or not all(isinstance(value, str) for value in values.values()):
        raise ValueError(f"its {METADATA} does not map names to text")
    return values


def _tensors(path: Path, header: dict, data_start: int, nbytes: int) -> Iterator[tuple[str, Tensor]]:
    spans = []
    for name, entry in header.items():
        if not isinstance(entry, dict):
            raise ValueError(f"tensor {name} is not described by an object")
        dtype, shape, offsets = entry.get("dtype"), entry.get("shape"), entry.get("data_offsets")
        if not isinstance(dtype, str) or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
            raise ValueError(f"tensor {name} lacks a proper dtype, shape or data_offsets")
        begin, end = offsets
        if begin > end or data_start + end > nbytes:
            raise ValueError(f"truncated: tensor {name} ends at byte {data_start + end:,}, the file at {nbytes:,}")
        if dtype in ITEM_BYTES and math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
            raise ValueError(f"tensor {name} is {dtype} {shape} but has {end - begin:,} bytes")
        spans.append((begin, end, name))
        yield name, Tensor(name, path, dtype, tuple(shape), data_start + begin)
    covered = 0
    for begin, end, name in sorted(spans):
        if begin != covered:
            raise ValueError(f"a gap or an overlap before tensor {name}")
        covered = end
    if data_start + covered != nbytes:
        raise ValueError(f"oversized: {data_start + covered:,} bytes expected, {nbytes:,} found")


def _naturals(value) -> bool:
    return isinstance(value, list) and all(type(item) is int and 0 <= item < 1 << 63 for item in value)
