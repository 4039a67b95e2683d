"""Model files `.m`: mapped for reading, written tensor by tensor."""

import mmap
import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from dllama.errors import FileError, FormatError
from dllama.formats import layout
from dllama.formats.blocks import FloatType, dequantize, quantize
from dllama.formats.config import ModelConfig
from dllama.formats.files import AtomicFile, open_regular, reason, release_pages
from dllama.formats.header import MAX_HEADER_BYTES, pack_header, unpack_header
from dllama.formats.layout import TensorInfo

CHUNK_BYTES = 16 << 20  # float32 values converted at a time when a tensor is written


class ModelFile:
    """A model file, checked and mapped into memory read-only: a tensor's bytes are read when they are touched.

    Nothing is mapped before the header makes sense and the file's length is exactly what the header calls for.
    Raises FileError where the file cannot be opened, FormatError where it is not a sound model.

    config: ModelConfig;  path: Path;  nbytes: size of the file;  header_bytes: offset of the first tensor;  stat: what
    the system said of the file when it was opened
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        with open_regular(path) as file:
            try:
                self.config, self.header_bytes = unpack_header(file.read(MAX_HEADER_BYTES))
            except ValueError as error:
                raise FormatError(self.path, str(error)) from None
            self.stat = os.fstat(file.fileno())
            self.nbytes = self.stat.st_size
            expected = self.header_bytes + layout.weights_bytes(self.config)
            if self.nbytes != expected:
                state = "truncated" if self.nbytes < expected else "oversized"
                raise FormatError(self.path, f"{state}: {expected:,} bytes expected, {self.nbytes:,} found")
            try:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            except OSError as error:
                raise FileError(self.path, f"cannot be mapped: {reason(error)}") from None
        self._bytes = np.frombuffer(self._map, dtype=np.uint8)
        self._tensors = {(info.name, info.layer): info for info in layout.tensor_layout(self.config, self.header_bytes)}

    def tensors(self) -> Iterable[TensorInfo]:
        """Every tensor, in file order."""
        return self._tensors.values()

    def info(self, name: str, layer: int | None = None) -> TensorInfo:
        """Shape, type and place of a tensor; KeyError where the model has none of this name and layer."""
        return self._tensors[name, layer]

    def raw(self, name: str, layer: int | None = None) -> np.ndarray:
        """The stored bytes of a tensor: a read-only uint8 [rows, row_bytes] view of the mapping, no copy."""
        info = self.info(name, layer)
        return self._bytes[info.offset : info.offset + info.nbytes].reshape(info.rows, info.row_bytes)

    def f32(self, name: str, layer: int | None = None) -> np.ndarray:
        """A tensor's values: float32 [rows, columns], or [columns] for a norm.

        F32 tensors are views of the mapping, but for norms that F16 matrices of odd sizes leave off a 4-byte boundary:
        these are copies, as are tensors of any other type.
        """
        info, raw = self.info(name, layer), self.raw(name, layer)
        if info.float_type is FloatType.F32 and info.offset % 4 == 0:
            return raw.view("<f4").reshape(info.shape)
        return dequantize(raw, info.float_type, info.columns).reshape(info.shape)

    def release(self, name: str, layer: int | None = None, rows: range | None = None) -> None:
        """Let go of the pages of a tensor, or of some of its rows, where the system can; they are read again if they
        are touched."""
        info = self.info(name, layer)
        rows = range(info.rows) if rows is None else rows
        release_pages(self._map, info.offset + rows.start * info.row_bytes, info.offset + rows.stop * info.row_bytes)

    def close(self) -> None:
        """Let go of the mapping. Views that others still hold stay valid; the mapping goes with the last one."""
        self._bytes = np.empty(0, dtype=np.uint8)
        try:
            self._map.close()
        except BufferError:
            pass

    def __enter__(self) -> "ModelFile":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class ModelWriter:
    """Writes a model file, tensor by tensor in any order; the file appears when it is complete, or not at all.

    Use as a context manager: leaving the block checks that nothing is missing and gives the file its name, an
    exception removes what was written. Raises FileError for a full disk and the like, ValueError for tensors that the
    model has not, or that were written before, or of the wrong shape, and for values that cannot be stored.
    """

    def __init__(self, path: str | os.PathLike, config: ModelConfig):
        header = pack_header(config)
        self.config = config
        self.nbytes = len(header) + layout.weights_bytes(config)
        self._file = AtomicFile(path, self.nbytes)
        self._file.write(header)
        self._missing = {(info.name, info.layer): info for info in layout.tensor_layout(config, len(header))}

    def write(self, name: str, layer: int | None, data: np.ndarray) -> None:
        """Write a tensor: floats [rows, columns] ([columns] for a norm), or its stored bytes as uint8
        [rows, row_bytes]."""
        self.write_chunks(name, layer, [data])

    def write_chunks(self, name: str, layer: int | None, chunks: Iterable[np.ndarray]) -> None:
        """Write a tensor from arrays of some of its rows each, first rows first."""
        info = self._missing.get((name, layer))
        if info is None:
            raise ValueError(f"{name} (layer {layer}) is none of the model's tensors, or written already")
        self._file.seek(info.offset)
        rows = 0
        for chunk in chunks:
            chunk = np.atleast_2d(chunk)
            width = info.row_bytes if chunk.dtype == np.uint8 else info.columns
            if chunk.ndim != 2 or chunk.shape[1] != width or rows + len(chunk) > info.rows:
                raise ValueError(f"{info.label}: {chunk.shape} at row {rows} of [{info.rows}, {width}]")
            self._write_rows(info, chunk)
            rows += len(chunk)
        if rows != info.rows:
            raise ValueError(f"{info.label}: {rows} of {info.rows} rows written")
        del self._missing[name, layer]

    def _write_rows(self, info: TensorInfo, chunk: np.ndarray) -> None:
        if chunk.dtype == np.uint8:
            self._file.write(np.ascontiguousarray(chunk))
            return
        step = max(1, CHUNK_BYTES // (4 * info.columns))
        for start in range(0, len(chunk), step):
            try:
                raw = quantize(chunk[start : start + step], info.float_type)
            except ValueError as error:
                raise ValueError(f"{info.label}: {error}") from None
            self._file.write(raw)

    def close(self) -> None:
        """Give the complete file its name; ValueError, and no file, where tensors are missing."""
        for info in self._missing.values():
            self._file.abort()
            raise ValueError(f"closed before {info.label} was written")
        self._file.commit()

    def abort(self) -> None:
        """Remove what was written."""
        self._file.abort()

    def __enter__(self) -> "ModelWriter":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            self.abort()
        else:
            self.close()
