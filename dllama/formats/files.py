"""Opening files safely and writing them whole or not at all."""

import atexit
import contextlib
import errno
import mmap
import os
import secrets
import shutil
import stat
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from dllama.errors import FileError

NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

NEIGHBOURS = 2 << 20
"""Bytes that Linux may map along with one that is touched, aligned to themselves: a huge page of its file cache."""


UNFINISHED: dict[Path, int] = {}
"""Temporary file -> the process that made it."""

WRITE_BEHIND = 8 << 20
"""Bytes of a long file after which they are sent to the disk, and those that were sent before leave the memory."""


def open_regular(path: str | os.PathLike) -> BinaryIO:
    """Open a regular file for reading; FileError for a missing one, a folder, a pipe or no permission."""
    try:
        # O_NONBLOCK: opening a named pipe must not wait for a writer.
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise FileError(path, reason(error)) from None
    except ValueError:  # a zero byte in the path
        raise FileError(repr(str(path)), "not a path") from None
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        raise FileError(path, "a folder, not a file" if stat.S_ISDIR(mode) else "not a regular file")
    return os.fdopen(fd, "rb")


@atexit.register
def _remove_unfinished() -> None:
    """Remove what no ``with`` block knew of yet when a signal ended the program."""
    for path, process in list(UNFINISHED.items()):
        if process == os.getpid():
            with contextlib.suppress(OSError):
                os.unlink(path)


def refuse_overwriting(out: str | os.PathLike, sources: Iterable[str | os.PathLike]) -> None:
    """FileError where ``out`` is one of the files that it is to be made from, by this name or another."""
    for source in sources:
        try:
            same = os.path.samefile(out, source)
        except (OSError, ValueError):  # one of them is not there, or no path
            continue
        if same:
            raise FileError(out, "is what it would be made from: write to another file")


def release_pages(mapped: mmap.mmap, first: int, end: int) -> None:
    """Let go of the pages of bytes ``first`` up to ``end`` of a file mapped read-only, where the system can.

    Those that came along with them go too. All are read again, mostly from the system's own memory, if touched.
    """
    if hasattr(mmap, "MADV_DONTNEED") and first < end:
        first, end = first & -NEIGHBOURS, min(-(-end // NEIGHBOURS) * NEIGHBOURS, len(mapped))
        mapped.madvise(mmap.MADV_DONTNEED, first, end - first)


def reason(error: OSError) -> str:
    """The error in plain words, without Python's numbers and quotes."""
    return {
        errno.ENOENT: "no such file or folder",
        errno.ENOTDIR: "a part of the path is not a folder",
        errno.EISDIR: "a folder, not a file",
        errno.EACCES: "permission denied",
    }.get(error.errno, (error.strerror or str(error)).lower())


class AtomicFile:
    """A file that appears under its name only when it is complete.

    It is written beside its final place and renamed by ``commit``; ``abort`` (or leaving the ``with`` block by any
    exception, Ctrl-C included) removes it. Every failure of the system is a FileError that names the final path.

    A long file goes to the disk as it is written and does not stay in the system's memory, where the system can be
    told so: it would push out what is needed, such as the file that is read meanwhile, and the flush at the end would
    wait for all of it.
    """

    def __init__(self, path: str | os.PathLike, nbytes: int):
        """nbytes: the size that the file will have; FileError at once where the disk has less room."""
        self.path = Path(path)
        self.nbytes = nbytes
        self._target = Path(os.path.realpath(path))  # a link is written through, not replaced
        try:
            if not stat.S_ISREG(os.stat(self._target).st_mode):
                raise FileError(self.path, "exists and is not a regular file")
        except FileNotFoundError:
            pass
        except OSError as error:  # a name too long, links in a circle
            raise self._error(error) from None
        free = self._free()
        if free is not None and free < nbytes:
            raise FileError(self.path, f"the disk is too full: {nbytes:,} bytes needed, {free:,} free")
        self._temporary = self._target.with_name(f".{self._target.name[:200]}.{secrets.token_hex(4)}.tmp")
        UNFINISHED[self._temporary] = os.getpid()
        try:
            # Not tempfile: its files are readable by their owner alone, and the mode would survive the rename.
            fd = os.open(self._temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        except OSError as error:
            UNFINISHED.pop(self._temporary, None)
            raise self._error(error) from None
        self._file = os.fdopen(fd, "wb")
        self._sent = 0  # where the bytes begin that were not sent to the disk yet

    def seek(self, offset: int) -> None:
        """Go on writing at another place; what was never written is zeros."""
        try:
            self._sent = self._file.seek(offset)
        except OSError as error:  # what was buffered is written
            self.abort()
            raise self._error(error) from None

    def write(self, data) -> None:
        """Write bytes, or an array's bytes, behind what was written last."""
        try:
            self._file.write(data)
            end = self._file.tell()
            if end - self._sent >= WRITE_BEHIND and hasattr(os, "posix_fadvise"):
                # Clean pages go, dirty ones are sent: each stretch is told of twice.
                first = max(0, self._sent - WRITE_BEHIND)
                os.posix_fadvise(self._file.fileno(), first, end - first, os.POSIX_FADV_DONTNEED)
                self._sent = end
        except OSError as error:
            self.abort()
            raise self._error(error) from None

    def commit(self) -> None:
        """Flush to the disk and take the final name, replacing what was there."""
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            os.replace(self._temporary, self._target)
            UNFINISHED.pop(self._temporary, None)
        except OSError as error:
            self.abort()
            raise self._error(error) from None
        except BaseException:
            self.abort()
            raise

    def abort(self) -> None:
        """Remove the incomplete file; nothing happens after ``commit`` or a second time."""
        with contextlib.suppress(OSError):  # closing flushes, which fails again on a full disk
            self._file.close()
        with contextlib.suppress(OSError):
            os.unlink(self._temporary)
        UNFINISHED.pop(self._temporary, None)

    def __enter__(self) -> "AtomicFile":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if kind is not None:
            self.abort()
        elif not self._file.closed:
            self.commit()

    def _free(self) -> int | None:
        try:
            return shutil.disk_usage(self._target.parent).free
        except OSError:
            return None  # the folder is missing or closed to us: opening says so

    def _error(self, error: OSError) -> FileError:
        if error.errno not in NO_ROOM:
            return FileError(self.path, f"cannot be written: {reason(error)}")
        free = self._free()
        room = f", {free:,} free" if free is not None else ""
        return FileError(self.path, f"cannot be written: {reason(error)} ({self.nbytes:,} bytes needed{room})")
