"""The hash of a file, taken from its bytes as they are read for the conversion, so that they are read but once."""

import hashlib
import os
from pathlib import Path

import numpy as np

from dllama.errors import FileError
from dllama.formats.files import open_regular
from dllama.formats.tensor import read_bytes

CHUNK_BYTES = 1 << 20  # read at a time, where nobody else reads them


class HashedFile:
    """The SHA-256 of one file, which goes over its bytes in their order.

    Bytes that come as they follow in the file are hashed as they come. What was left out before them, such as a header,
    is read first; what comes later than its turn has been read so, and is left aside.
    """

    def __init__(self, path: Path):
        self.path = path
        self._opened = self._stat()
        self._digest, self._end = hashlib.sha256(), 0

    @property
    def nbytes(self) -> int:
        """The file's size when it was first looked at."""
        return self._opened.st_size

    def add(self, offset: int, data: np.ndarray) -> None:
        """Bytes that were read: uint8, the first of them at ``offset`` of the file."""
        self._read_to(offset)
        if offset + len(data) > self._end:
            self._digest.update(data[self._end - offset :])
            self._end = offset + len(data)

    def finish(self) -> str:
        """The hash of the whole file, in hexadecimal. FileError where the file is not what it was at first."""
        self._read_to(self.nbytes)
        before, now = self._opened, self._stat()
        if any(getattr(now, name) != getattr(before, name) for name in ("st_dev", "st_ino", "st_size", "st_mtime_ns")):
            raise FileError(self.path, "changed while it was read")
        return self._digest.hexdigest()

    def _read_to(self, offset: int) -> None:
        while self._end < offset:
            data = read_bytes(self.path, self._end, min(CHUNK_BYTES, offset - self._end))
            self._digest.update(data)
            self._end += len(data)

    def _stat(self) -> os.stat_result:
        with open_regular(self.path) as file:
            return os.fstat(file.fileno())
