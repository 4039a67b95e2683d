"""A node's slice of a model: as one stream of bytes, and as tensors for the engine."""

import mmap
from abc import ABC, abstractmethod
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice

import numpy as np

from dllama.cluster.share import Share
from dllama.formats import FloatType, ModelFile, TensorInfo, dequantize, tensor_layout
from dllama.formats.files import release_pages

ALIGN = 64
"""Every tensor of the stream starts at a multiple of so many bytes."""


class SliceLayout:
    """The stream of bytes that a share's tensors make, all but the embedding, in the order of the model file.

    Each tensor is contiguous, row-major ``[rows, row_bytes]`` of its slice, norms and routers are whole, and zeros fill
    the gaps before multiples of ALIGN. The worker keeps it as it comes; equal shares of equal models give equal
    streams.

    share: Share;  tensors: those of the slice, with their shapes in the slice and offsets in the stream, some of them
    empty where nodes are many;  nbytes: length of the stream
    """

    def __init__(self, share: Share):
        self.share = share
        tensors, end = [], 0
        for whole in tensor_layout(share.config):
            if whole.name == "embedding":
                continue
            rows, columns = share.slices[whole.kind]
            start = -(-end // ALIGN) * ALIGN
            tensors.append(replace(whole, rows=len(rows), columns=len(columns), offset=start))
            end = start + tensors[-1].nbytes
        self.tensors: tuple[TensorInfo, ...] = tuple(tensors)
        self.nbytes = end
        self._offsets = [info.offset for info in tensors]
        self._tensors = {(info.name, info.layer): info for info in tensors}

    def info(self, name: str, layer: int | None = None) -> TensorInfo:
        """Shape, type and place in the stream; KeyError where the slice has no tensor of this name and layer."""
        return self._tensors[name, layer]

    def between(self, first: int, end: int) -> Iterable[TensorInfo]:
        """Those tensors that have bytes from ``first`` up to ``end`` of the stream."""
        for info in islice(self.tensors, max(0, bisect_right(self._offsets, first) - 1), None):
            if info.offset >= end:
                return
            if info.offset + info.nbytes > first and info.nbytes:
                yield info


class _Slice(ABC):
    """A share's tensors as the engine's weights want them."""

    def __init__(self, layout: SliceLayout):
        self.layout = layout
        self.config = layout.share.config

    def tensors(self) -> Iterable[TensorInfo]:
        """Every tensor but the embedding, in file order, with the shapes of the slice."""
        return self.layout.tensors

    def info(self, name: str, layer: int | None = None) -> TensorInfo:
        """Shape and type of a tensor's slice; KeyError where there is none of this name and layer."""
        return self.layout.info(name, layer)

    @abstractmethod
    def raw(self, name: str, layer: int | None = None) -> np.ndarray:
        """The stored bytes of a tensor's slice: a uint8 [rows, row_bytes] view, its rows at any stride."""

    @abstractmethod
    def release(self, name: str, layer: int | None = None) -> None:
        """Let go of the memory that a tensor's slice takes, where the system can."""

    def f32(self, name: str, layer: int | None = None) -> np.ndarray:
        """Values of a tensor's slice: float32 [rows, columns], or [columns] for a norm; a copy but for F32 rows that
        follow one another on 4-byte boundaries."""
        info, raw = self.info(name, layer), self.raw(name, layer)
        if info.float_type is FloatType.F32 and raw.flags.c_contiguous and raw.ctypes.data % 4 == 0:
            return raw.view("<f4").reshape(info.shape)
        return dequantize(raw, info.float_type, info.columns).reshape(info.shape)


class ModelSlice(_Slice):
    """A share's tensors where the whole model's file is mapped: nothing is copied."""

    def __init__(self, model: ModelFile, share: Share):
        super().__init__(SliceLayout(share))
        self.model = model

    def raw(self, name: str, layer: int | None = None) -> np.ndarray:
        """The stored bytes: a read-only uint8 [rows, row_bytes] view. A row of a column slice is followed by the next
        one a whole row of the model later."""
        return _stored(self.model, self.layout.share, self.model.info(name, layer))

    def release(self, name: str, layer: int | None = None) -> None:
        """Let go of the mapped pages; they are read again if they are touched."""
        self.model.release(name, layer, self.layout.share.slices[self.info(name, layer).kind].rows)


class StoredSlice(_Slice):
    """A share's tensors in the bytes of its own stream.

    data: uint8 [layout.nbytes], from a file that is mapped read-only or from memory
    """

    def __init__(self, layout: SliceLayout, data: np.ndarray):
        if data.shape != (layout.nbytes,) or data.dtype != np.uint8:
            raise ValueError(f"a slice of {data.dtype} {data.shape}, and its layout asks for uint8 ({layout.nbytes},)")
        super().__init__(layout)
        self.data = data

    def raw(self, name: str, layer: int | None = None) -> np.ndarray:
        """The stored bytes: a contiguous uint8 [rows, row_bytes] view."""
        info = self.info(name, layer)
        return self.data[info.offset : info.offset + info.nbytes].reshape(info.rows, info.row_bytes)

    def release(self, name: str, layer: int | None = None) -> None:
        """Let go of the pages. Those of a file are read again if they are touched; memory is given back with what it
        holds, so that the tensor is zeros from then on."""
        info, mapped = self.info(name, layer), _mapping(self.data)
        if mapped is None:
            return
        start = self.data.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
        first, end = start + info.offset, start + info.offset + info.nbytes
        if not self.data.flags.writeable:
            release_pages(mapped, first, end)
            return
        first, end = -(-first // mmap.PAGESIZE) * mmap.PAGESIZE, end & -mmap.PAGESIZE  # the rest is its neighbours'
        if hasattr(mmap, "MADV_DONTNEED") and first < end:
            mapped.madvise(mmap.MADV_DONTNEED, first, end - first)


def _mapping(array: np.ndarray) -> mmap.mmap | None:
    """What of the system's memory an array is a view of; None where it is no such view."""
    base = array
    while isinstance(base, np.ndarray | memoryview):
        base = base.obj if isinstance(base, memoryview) else base.base
    return base if isinstance(base, mmap.mmap) else None


def read(model: ModelFile, layout: SliceLayout, first: int, nbytes: int) -> np.ndarray:
    """Bytes ``first`` up to ``first + nbytes`` of a slice's stream, gathered from the model that it is a slice of.

    A new uint8 [nbytes]; the model's pages are let go, so that a node can send any number of slices in little memory.
    """
    end = first + nbytes
    if not 0 <= first <= end <= layout.nbytes:
        raise ValueError(f"bytes {first} to {end} of a slice of {layout.nbytes}")
    out = np.zeros(nbytes, np.uint8)
    for info in layout.between(first, end):
        start, stop = max(first, info.offset), min(end, info.offset + info.nbytes)
        part = out[start - first : stop - first]
        _gather(model, layout.share, info, start - info.offset, part)
    return out


def _gather(model: ModelFile, share: Share, info: TensorInfo, first: int, out: np.ndarray) -> None:
    """Fill ``out`` with the bytes of one tensor's slice from ``first`` on."""
    rows = range(first // info.row_bytes, -(-(first + len(out)) // info.row_bytes))
    source = _stored(model, share, model.info(info.name, info.layer))[rows.start : rows.stop]
    skip = first - rows.start * info.row_bytes  # of the first row
    if source.flags.c_contiguous:
        out[:] = source.reshape(-1)[skip : skip + len(out)]
    else:
        head = min(len(out), -skip % info.row_bytes)
        whole = (len(out) - head) // info.row_bytes
        tail = head + whole * info.row_bytes
        out[:head] = source[0, skip : skip + head]
        source = source[head > 0 :]
        out[head:tail].reshape(whole, info.row_bytes)[:] = source[:whole]
        out[tail:] = source[-1:, : len(out) - tail].ravel()
    offset = share.slices[info.kind].rows.start
    model.release(info.name, info.layer, range(offset + rows.start, offset + rows.stop))


def _stored(model: ModelFile, share: Share, whole: TensorInfo) -> np.ndarray:
    """The slice of one of the model's tensors: a uint8 [rows, row_bytes] view."""
    rows, columns = share.slices[whole.kind]
    first, end = (whole.float_type.row_bytes(column) for column in (columns.start, columns.stop))
    return model.raw(whole.name, whole.layer)[rows.start : rows.stop, first:end]
