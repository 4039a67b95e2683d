"""A slice on its way from the root to a worker, chunk by chunk: both ends, without what lies between them."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from dllama.cluster.digest import DIGEST_BYTES, require_unchanged
from dllama.cluster.slices import SliceLayout, read
from dllama.engine.pages import anonymous
from dllama.errors import ClusterError
from dllama.formats import ModelFile

CHUNK_BYTES = 1 << 20


class Chunk(NamedTuple):
    """A part of a slice's stream; ``data`` is uint8 [chunk_bytes], shorter in the last chunk."""

    index: int
    digest: bytes
    data: np.ndarray


def chunk_digest(data) -> bytes:
    """BLAKE2b of a chunk, 16 bytes."""
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


def chunk_count(nbytes: int, chunk_bytes: int) -> int:
    """How many chunks a slice of so many bytes makes."""
    return -(-nbytes // chunk_bytes)


class Sending:
    """The root's end: gives one chunk after another, without those that the worker has.

    held: digests of the chunks that the worker has, by index; b"" for others, and those past its end

    done_bytes, total_bytes: how far it is, what the worker had included
    """

    def __init__(
        self, model: ModelFile, layout: SliceLayout, held: Sequence[bytes] = (), chunk_bytes: int = CHUNK_BYTES
    ):
        self._model, self._layout, self._held, self._chunk_bytes = model, layout, held, chunk_bytes
        self._index = 0
        self.done_bytes, self.total_bytes = 0, layout.nbytes

    def next(self) -> Chunk | None:
        """The next chunk to send; None after the last. Raises FileError where the model has changed on disk.

        Chunks that the worker has are read as well, to see that they are the same: all of them in one call.
        """
        while self.done_bytes < self.total_bytes:
            require_unchanged(self._model)
            index, size = self._index, min(self._chunk_bytes, self.total_bytes - self.done_bytes)
            data = read(self._model, self._layout, self.done_bytes, size)
            digest = chunk_digest(data)
            self._index += 1
            self.done_bytes += size
            if index >= len(self._held) or self._held[index] != digest:
                return Chunk(index, digest, data)
        return None


def adapter_chunks(values: Iterable[np.ndarray]) -> Iterator[Chunk]:
    """A slice of adapters, as of `values_of`: the chunks follow one another in the order of their bytes."""
    index = 0
    for matrix in values:
        data = matrix.reshape(-1).view(np.uint8)
        for first in range(0, len(data), CHUNK_BYTES):
            part = data[first : first + CHUNK_BYTES]
            yield Chunk(index, chunk_digest(part), part)
            index += 1


class Incoming(ABC):
    """The worker's end: takes chunks in any order, checks them, and has the slice in the end.

    nbytes: of the slice;  done_bytes: of the chunks that are there;  held: the digest of each chunk that is there, by
    index, and b"" for the others. What an earlier transfer left is there from the start.
    """

    def __init__(self, nbytes: int, chunk_bytes: int, held: list[bytes]):
        self.nbytes, self.chunk_bytes, self.held = nbytes, chunk_bytes, held
        self.done_bytes = sum(self._size(index) for index, digest in enumerate(held) if digest)

    def write(self, index: int, data, digest: bytes) -> None:
        """Take a chunk. Raises ClusterError for one that the slice does not have, of the wrong size, or whose bytes are
        not those of the digest; FileError where it cannot be written."""
        if not 0 <= index < len(self.held):
            raise ClusterError(f"chunk {index} of a slice that has {len(self.held)}")
        data = memoryview(data).cast("B")
        if len(data) != self._size(index):
            raise ClusterError(f"chunk {index} has {len(data)} bytes in place of {self._size(index)}")
        if chunk_digest(data) != digest:
            raise ClusterError(f"chunk {index} arrived damaged: its digest is another")
        self._put(index, data, digest)
        if not self.held[index]:
            self.done_bytes += len(data)
        self.held[index] = digest

    def finish(self) -> np.ndarray:
        """The slice, uint8 [nbytes]. Raises ClusterError where chunks are missing, FileError where it is not kept."""
        missing = self.held.count(b"")
        if missing:
            raise ClusterError(f"{missing} of {len(self.held)} chunks of the slice are missing")
        return self._finish()

    @abstractmethod
    def close(self) -> None:
        """Let go of it, but not of what `finish` gave. Chunks on disk stay there, and another transfer can go on."""

    def _size(self, index: int) -> int:
        return min(self.chunk_bytes, self.nbytes - index * self.chunk_bytes)

    @abstractmethod
    def _put(self, index: int, data: memoryview, digest: bytes) -> None: ...

    @abstractmethod
    def _finish(self) -> np.ndarray: ...

    def __enter__(self) -> "Incoming":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class MemoryIncoming(Incoming):
    """A slice that arrives in memory, and is gone with the process. Raises OutOfMemoryError."""

    def __init__(self, nbytes: int, chunk_bytes: int):
        super().__init__(nbytes, chunk_bytes, [b""] * chunk_count(nbytes, chunk_bytes))
        self._data = anonymous(nbytes, huge=False)

    def close(self) -> None:
        self._data = self._data[:0].copy()

    def _put(self, index: int, data: memoryview, digest: bytes) -> None:
        first = index * self.chunk_bytes
        self._data[first : first + len(data)] = data

    def _finish(self) -> np.ndarray:
        return self._data
