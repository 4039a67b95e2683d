"""Reading safetensors checkpoints: one file, or several under an index.

A file is ``uint64 header_bytes``, a JSON object of that length, then the tensors' bytes. The object maps a name to
``{"dtype", "shape", "data_offsets": [begin, end]}``, offsets counted from the end of the header; the tensors cover the
bytes without gaps or overlaps (https://github.com/huggingface/safetensors#format). Everything is checked on opening.

Rows are read, not mapped: pages of a mapping would count as the program's memory, up to the whole checkpoint.
"""

import json
import math
import os
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dllama.errors import FileError, FormatError
from dllama.formats.files import open_regular, reason

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
MAX_JSON_BYTES = 100_000_000  # the limit that the format's own library sets

ITEM_BYTES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 2),
    **dict.fromkeys(("I32", "U32", "F32"), 4),
    **dict.fromkeys(("I64", "U64", "F64"), 8),
}
READABLE = ("F32", "F16", "BF16")


@dataclass(frozen=True)
class Tensor:
    """One tensor of a safetensors file."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int  # from the start of the file, in bytes

    @property
    def row_bytes(self) -> int:
        """Bytes of a row, the values of the last dimension."""
        return self.shape[-1] * ITEM_BYTES[self.dtype]

    def rows(self, start: int, stop: int) -> np.ndarray:
        """Rows ``start`` to ``stop`` as float32 [stop - start, columns], for a tensor of one or two dimensions."""
        count = (stop - start) * self.row_bytes
        with open_regular(self.path) as file:
            try:
                file.seek(self.offset + start * self.row_bytes)
                data = file.read(count)
            except OSError as error:
                raise FileError(self.path, f"cannot be read: {reason(error)}") from None
        if len(data) != count:
            raise FileError(self.path, "became shorter while it was read")
        return to_float32(data, self.dtype).reshape(stop - start, self.shape[-1])


def to_float32(data: bytes, dtype: str) -> np.ndarray:
    """The numbers in ``data``, of a dtype in READABLE, as float32 [n]; bfloat16 is float32's upper half."""
    if dtype == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(data, dtype="<f4" if dtype == "F32" else "<f2").astype(np.float32, copy=False)


def open_checkpoint(folder: str | os.PathLike) -> dict[str, Tensor]:
    """Every tensor of a checkpoint folder by name. FileError for a missing file, FormatError for a damaged one."""
    folder = Path(folder)
    index = folder / INDEX
    if not index.exists():
        single = folder / SINGLE
        if not single.exists():
            raise FileError(folder, f"holds no safetensors checkpoint (neither {SINGLE} nor {INDEX})")
        return read_file(single)

    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(index, "has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise FormatError(index, f"names a file {name!r}, which is not a plain file name")
    files = {name: read_file(folder / name) for name in sorted(set(weight_map.values()))}
    for tensor, name in weight_map.items():
        if tensor not in files[name]:
            raise FormatError(folder / name, f"lacks tensor {tensor}, which {INDEX} places there")
    return {tensor: files[name][tensor] for tensor, name in weight_map.items()}


def read_file(path: str | os.PathLike) -> dict[str, Tensor]:
    """Every tensor of one safetensors file by name, from its checked header."""
    with open_regular(path) as file:
        nbytes = os.fstat(file.fileno()).st_size
        head = file.read(8)
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
