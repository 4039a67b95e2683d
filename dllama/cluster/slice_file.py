"""The file that keeps a slice, whole or in part.

    header  4096 bytes: JSON, filled up with spaces
    data    the slice's stream
    digests 16 bytes for each chunk of it; zeros for one that is not there

A file is locked by whoever has it open: shared by those who read it, exclusively by who writes it. A mapping keeps its
file's lock, so that a slice is locked as long as any array shows it, and the lock of a dead process is gone.
"""

import fcntl
import json
import mmap
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from dllama.cluster.digest import DIGEST_BYTES
from dllama.cluster.transfer import Incoming, chunk_count, chunk_digest
from dllama.errors import FileError
from dllama.formats.files import reason

HEADER_BYTES = 4096
LABEL_CHARACTERS = 200
FLUSH_BYTES = 64 << 20
"""What arrives goes to the disk in so many bytes at a time: nothing then takes long in the end, and what a loss of
power leaves can be gone on with."""

MISSING = bytes(DIGEST_BYTES)


@dataclass(frozen=True)
class About:
    """What the header says."""

    name: str
    label: str  # for people
    nbytes: int  # of the slice
    chunk_bytes: int

    @property
    def chunks(self) -> int:
        return chunk_count(self.nbytes, self.chunk_bytes)

    @property
    def file_bytes(self) -> int:
        return HEADER_BYTES + self.nbytes + DIGEST_BYTES * self.chunks


class SliceFile:
    """One such file, open; every method raises OSError where the system does. Use as a context manager, or close it."""

    def __init__(self, path: Path, flags: int = os.O_RDONLY):
        self.path = path
        self.fd = os.open(path, flags | os.O_CLOEXEC, 0o666)

    def lock(self, exclusive: bool) -> None:
        """Wait until the file is ours: shared or exclusively."""
        fcntl.flock(self.fd, fcntl.LOCK_EX if exclusive else fcntl.LOCK_SH)

    def lock_at_once(self) -> bool:
        """Lock it exclusively, if nobody else has it."""
        try:
            fcntl.flock(self.fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True

    def about(self) -> About | None:
        """What the header says; None where it makes no sense or the file is not as long as it says."""
        try:
            about = About(**json.loads(os.pread(self.fd, HEADER_BYTES, 0)))
            types = [type(value) for value in asdict(about).values()]
            if types == [str, str, int, int] and about.nbytes >= 0 and about.chunk_bytes > 0:
                return about if os.fstat(self.fd).st_size == about.file_bytes else None
        except (ValueError, TypeError, RecursionError):
            pass
        return None

    def create(self, about: About) -> None:
        """Start afresh: a header, and room on the disk for all the rest."""
        os.ftruncate(self.fd, 0)
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(self.fd, 0, about.file_bytes)
        else:
            os.ftruncate(self.fd, about.file_bytes)
        _write(self.fd, json.dumps(asdict(about)).encode().ljust(HEADER_BYTES), 0)

    def write(self, about: About, index: int, data: memoryview, digest: bytes) -> None:
        """Keep a chunk, and then its digest."""
        _write(self.fd, data, HEADER_BYTES + index * about.chunk_bytes)
        _write(self.fd, digest, HEADER_BYTES + about.nbytes + index * DIGEST_BYTES)

    def digests(self, about: About) -> list[bytes]:
        """The digest of each chunk, as it is noted; b"" for those that are not there."""
        table = os.pread(self.fd, DIGEST_BYTES * about.chunks, HEADER_BYTES + about.nbytes)
        digests = [table[start : start + DIGEST_BYTES] for start in range(0, len(table), DIGEST_BYTES)]
        return [b"" if digest == MISSING else digest for digest in digests]

    def verified(self, about: About, progress: Callable[[int, int], None] = lambda done, total: None) -> list[bytes]:
        """`digests`, with b"" for chunks whose bytes are not those of the digest, too. It reads all chunks;
        ``progress(done, total)`` is called with bytes."""
        digests, buffer = self.digests(about), memoryview(bytearray(min(about.chunk_bytes, about.nbytes)))
        for index, digest in enumerate(digests):
            if digest:
                start = index * about.chunk_bytes
                size = os.preadv(self.fd, [buffer[: about.nbytes - start]], HEADER_BYTES + start)
                if chunk_digest(buffer[:size]) != digest:
                    digests[index] = b""
                progress(start + size, about.nbytes)
        return digests

    def map(self, about: About) -> np.ndarray:
        """The slice: read-only uint8 [nbytes]. The file may be closed, it stays locked until the last view is gone."""
        mapped = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)  # which has a descriptor of its own
        return np.frombuffer(mapped, np.uint8)[HEADER_BYTES : HEADER_BYTES + about.nbytes]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
        self.fd = -1

    def __enter__(self) -> "SliceFile":
        return self

    def __exit__(self, *exception) -> None:
        self.close()


class DiskIncoming(Incoming):
    """A slice that arrives in a file. ``publish`` gives the file its name when it is whole."""

    def __init__(
        self, file: SliceFile, about: About, held: list[bytes], publish: Callable[[SliceFile, About], np.ndarray]
    ):
        super().__init__(about.nbytes, about.chunk_bytes, held)
        self._file, self._about, self._publish = file, about, publish
        self._unflushed = 0

    def close(self) -> None:
        self._file.close()

    def _put(self, index: int, data: memoryview, digest: bytes) -> None:
        with self._errors():
            self._file.write(self._about, index, data, digest)
            self._unflushed += len(data)
            if self._unflushed >= FLUSH_BYTES:
                os.fsync(self._file.fd)
                self._unflushed = 0

    def _finish(self) -> np.ndarray:
        with self._errors():
            data = self._publish(self._file, self._about)
        self.close()
        return data

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FileError(self._file.path, f"cannot be written: {reason(error)}") from None


def _write(fd: int, data, offset: int) -> None:
    data = memoryview(data)
    while data:
        written = os.pwrite(fd, data, offset)
        data, offset = data[written:], offset + written
