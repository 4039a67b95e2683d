"""Reading a safetensors file, and JSON files as carefully.

A file is ``uint64 header_bytes``, a JSON object of that length, then the tensors' bytes. The object maps a name to
``{"dtype", "shape", "data_offsets": [begin, end]}``, offsets counted from the end of the header; the tensors cover the
bytes without gaps or overlaps (https://github.com/huggingface/safetensors#format). Everything is checked on opening.
"""

import json
import math
import os
import struct
from collections.abc import Iterator
from pathlib import Path

from converter.tensors import ITEM_BYTES, Tensor
from dllama.errors import FormatError
from dllama.formats.files import open_regular

MAX_JSON_BYTES = 100_000_000  # the limit that the format's own library sets

LFS_POINTER = b"version https://git-lfs"
NOT_FETCHED = "a pointer of Git LFS, not the file itself: fetch it with 'git lfs pull'"


def read_safetensors(path: str | os.PathLike) -> dict[str, Tensor]:
    """Every tensor of one safetensors file by name, from its checked header."""
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
        return dict(_tensors(Path(path), _parse_json(text), 8 + header_bytes, nbytes))
    except ValueError as error:
        raise FormatError(path, str(error)) from None


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file; FormatError where there is none."""
    with open_regular(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise FormatError(path, f"larger than {MAX_JSON_BYTES:,} bytes")
    try:
        return _parse_json(text)
    except ValueError as error:
        raise FormatError(path, str(error)) from None


def _parse_json(text: bytes) -> dict:
    try:
        value = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except UnicodeDecodeError:
        raise ValueError("not JSON: not UTF-8 text") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _no_duplicates(pairs: list[tuple]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice} appears twice")
    return result


def _tensors(path: Path, header: dict, data_start: int, nbytes: int) -> Iterator[tuple[str, Tensor]]:
    header.pop("__metadata__", None)
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
