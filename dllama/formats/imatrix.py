"""Importance matrices: how large the activations are that meet each column of a model's matrices.

The file, little-endian: the 8 bytes ``DLIMATRX``, uint32 size of the header, the header, then float32 values. The
header is JSON::

    {"digest": "9f…", "tokens": 24576, "matrices": [["q", 0, 4096], …, ["output", null, 4096]]}

digest: BLAKE2b of the model file that was run, hexadecimal;  tokens: that it was fed;  matrices: name, layer and
columns of each, in the order of their values: the mean square, over all tokens, of what is multiplied with each column.
A converter writes other forms of the same model with it: columns are never reordered.
"""

import json
import os
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from dllama.errors import FormatError
from dllama.formats.config import MAX_DIM
from dllama.formats.files import AtomicFile, open_regular
from dllama.formats.layout import TensorInfo

MAGIC = b"DLIMATRX"
MAX_HEADER_BYTES = 64 << 20

Key = tuple[str, int | None]  # name and layer of a tensor


@dataclass(frozen=True)
class ImportanceMatrix:
    """What a text told of a model.

    digest: of the model file, hexadecimal;  tokens: of the text;  means: float32 [columns] for each matrix, none
    negative
    """

    digest: str
    tokens: int
    means: dict[Key, np.ndarray]


def write_imatrix(path: str | os.PathLike, matrix: ImportanceMatrix) -> None:
    """Raises FileError where the file cannot be written."""
    matrices = [[*key, len(means)] for key, means in matrix.means.items()]
    header = json.dumps({"digest": matrix.digest, "tokens": matrix.tokens, "matrices": matrices}).encode()
    parts = [MAGIC, struct.pack("<I", len(header)), header]
    parts += [means.astype("<f4").tobytes() for means in matrix.means.values()]
    with AtomicFile(path, sum(map(len, parts))) as file:
        for part in parts:
            file.write(part)


def read_imatrix(path: str | os.PathLike, tensors: Iterable[TensorInfo] = ()) -> ImportanceMatrix:
    """The file at ``path``, checked.

    tensors: those of the model that it is for; each that is stored in blocks has to be in it.
    Raises FileError where the file cannot be read, FormatError where it is damaged, no importance matrix, or that of
    another model.
    """
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        start = file.read(len(MAGIC) + 4)
        if len(start) < len(MAGIC) + 4 or not start.startswith(MAGIC):
            raise FormatError(path, "not an importance matrix (dllama imatrix makes one)")
        (length,) = struct.unpack_from("<I", start, len(MAGIC))
        try:
            matrix, columns = _header(file.read(length) if length <= MAX_HEADER_BYTES else b"")
        except (ValueError, TypeError, KeyError, RecursionError):
            raise FormatError(path, "an importance matrix with a damaged header") from None
        expected = len(start) + length + 4 * sum(columns)
        if size != expected:
            raise FormatError(path, f"a damaged importance matrix: {expected:,} bytes expected, {size:,} found")
        values = np.frombuffer(file.read(), "<f4")
    if not (np.isfinite(values).all() and (values >= 0).all()):
        raise FormatError(path, "a damaged importance matrix: not all of its values are finite and positive")
    matrix.means.update(zip(matrix.means, np.split(values, np.cumsum(columns)[:-1]), strict=True))
    for problem in _unfit(matrix, tensors):
        raise FormatError(path, f"the importance matrix of another model: {problem}")
    return matrix


def _header(raw: bytes) -> tuple[ImportanceMatrix, list[int]]:
    """The matrix with its values still to come, and their numbers; some error of Python's where it makes no sense."""
    header = json.loads(raw)
    columns = {(str(name), layer): n for name, layer, n in header["matrices"]}
    counts = [*columns.values(), header["tokens"]]
    layers = [layer for _, layer in columns if layer is not None]
    if not columns or len(columns) != len(header["matrices"]):
        raise ValueError("no matrices, or one of them twice")
    if not all(type(n) is int and n > 0 for n in counts) or not all(type(layer) is int for layer in layers):
        raise ValueError("counts or layers that are no numbers")
    if max(columns.values()) > MAX_DIM:
        raise ValueError("more columns than a matrix has")
    return ImportanceMatrix(str(header["digest"]), header["tokens"], dict.fromkeys(columns)), counts[:-1]


def _unfit(matrix: ImportanceMatrix, tensors: Iterable[TensorInfo]) -> Iterator[str]:
    for info in tensors:
        if info.float_type.is_quantized:
            means = matrix.means.get((info.name, info.layer))
            if means is None:
                yield f"{info.label} is not in it"
            elif len(means) != info.columns:
                yield f"{info.label} has {info.columns} columns, and {len(means)} in it"
