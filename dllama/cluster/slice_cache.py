"""A worker's slices on disk, so that each is sent once.

The folder holds a file for each slice, named by what the root says that it is a slice of: ``NAME.slice`` when it is
whole, ``NAME.part`` until then. Any number of processes may use it at once. What has not been used for longest makes
room for what is new, but nothing that any process has open; where the disk cannot take a slice, it is kept in memory.
"""

import fcntl
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path

import numpy as np

from dllama.cluster.slice_file import LABEL_CHARACTERS, About, DiskIncoming, SliceFile
from dllama.cluster.transfer import Incoming, MemoryIncoming
from dllama.engine.memory import in_units
from dllama.errors import ClusterError, FileError
from dllama.folders import cache_folder
from dllama.formats.files import reason

LARGEST_LIMIT = 100 * 10**9
"""The default limit is half of the disk's free space (what the cache takes counts as free), up to so many bytes."""

STALE_SECONDS = 7 * 86400
"""A transfer that nobody has gone on with for so long is given up."""

NAME = re.compile(r"[0-9a-f]{32}")
FILE = re.compile(rf"({NAME.pattern})(?:\.\d+)?\.(slice|part)")


@dataclass(frozen=True)
class Entry:
    """A slice in the cache."""

    path: Path
    name: str
    label: str  # what people may call it
    nbytes: int  # of the whole slice
    done_bytes: int  # of it, what is there
    file_bytes: int  # on disk
    used: float  # when it was used last, in seconds since 1970
    whole: bool
    busy: bool  # whether a process has it open


@dataclass(frozen=True)
class Cleared:
    """What `SliceCache.clear` did."""

    files: int
    nbytes: int
    busy: int  # files that were left, as processes have them open


class _NoRoom(Exception):
    """Why the disk does not take a slice."""


class SliceCache:
    """The cache in a folder, by default ``slices`` in the user's cache folder.

    limit: bytes that its files may take; None for the default, see LARGEST_LIMIT
    notify: called with a line for people where a slice cannot be kept on disk
    """

    def __init__(
        self,
        folder: str | os.PathLike | None = None,
        limit: int | None = None,
        notify: Callable[[str], None] = lambda line: None,
    ):
        self.folder = cache_folder() / "slices" if folder is None else Path(folder)
        self._limit, self._notify = limit, notify

    def find(self, name: str, nbytes: int) -> np.ndarray | None:
        """A whole slice: read-only uint8 [nbytes], mapped, and not evicted while any view of it lives; None where there
        is none of this size."""
        try:
            with SliceFile(self._path(name)) as file:
                file.lock(exclusive=False)
                about = file.about()
                if about is None or (about.name, about.nbytes) != (name, nbytes):
                    return None
                with suppress(OSError):  # somebody else's folder
                    os.utime(file.fd)
                return file.map(about)
        except OSError:
            return None

    def receive(
        self,
        name: str,
        nbytes: int,
        chunk_bytes: int,
        label: str,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ) -> Incoming:
        """Begin to take a slice in, or go on where a transfer of it broke off; what is there is verified first.
        ``progress(done, total)`` is called with the bytes that are.

        The disk's room is taken before the first byte comes. Where the disk cannot have it, or the limit is too small,
        the slice goes to memory, which may raise OutOfMemoryError. One slice that two processes receive at once is
        received twice, and kept once.
        """
        about = About(name, label[:LABEL_CHARACTERS], nbytes, chunk_bytes)
        try:
            file = self._begin(about)
            try:
                return DiskIncoming(file, about, file.verified(about, progress), self._publish)
            except BaseException:
                file.close()
                raise
        except _NoRoom as why:
            self._notify(f"this slice stays in memory, and has to be sent again at the next start: {why}")
        except OSError as error:
            self._notify(
                "this slice stays in memory, and has to be sent again at the next start: "
                f"{self.folder} cannot be used: {reason(error)}"
            )
        return MemoryIncoming(nbytes, chunk_bytes)

    def entries(self) -> list[Entry]:
        """All that the cache holds, last used first. Raises FileError."""
        with self._errors():
            if not self.folder.exists():
                return []
            with self._locked():
                return self._scan()[::-1]

    def clear(self, names: Collection[str] | None = None, older_than: float = 0) -> Cleared:
        """Remove the slices of these names (None: all) that have not been used for so many seconds, but those that are
        in use. Raises FileError."""
        last = time.time() - older_than
        chosen = [e for e in self.entries() if (names is None or e.name in names) and e.used <= last]
        if not chosen:
            return Cleared(0, 0, 0)
        with self._errors(), self._locked():
            gone = [entry for entry in chosen if _remove(entry.path)]
        return Cleared(len(gone), sum(entry.file_bytes for entry in gone), len(chosen) - len(gone))

    def verify(self, name: str) -> int:
        """Read a whole slice, and count the chunks that are not as they came. Raises FileError where there is none."""
        with self._errors(), SliceFile(self._path(name)) as file:
            file.lock(exclusive=False)
            about = file.about()
            if about is None:
                raise FileError(file.path, "not a slice")
            return file.verified(about).count(b"")

    def _path(self, name: str, ending: str = "slice") -> Path:
        if not NAME.fullmatch(name):  # names come over the network
            raise ClusterError(f"{name[:40]!r} is no name of a slice")
        return self.folder / f"{name}.{ending}"

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """One process at a time creates, renames and removes files."""
        fd = os.open(self.folder / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(fd, fcntl.LOCK_EX)
            yield
        finally:
            os.close(fd)

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise FileError(error.filename or self.folder, reason(error)) from None

    def _scan(self) -> list[Entry]:
        """Every slice, the one that has been used least recently first."""
        entries = []
        for path in self.folder.iterdir():
            if FILE.fullmatch(path.name):
                with suppress(FileNotFoundError), SliceFile(path) as file:
                    entries.append(_entry(file))
        return sorted(entries, key=lambda entry: entry.used)

    def _begin(self, about: About) -> SliceFile:
        """The file for a slice that comes in, locked, with all the room that it takes. Raises OSError, _NoRoom."""
        first = self._path(about.name, "part")
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._locked():
            for entry in self._scan():
                if not entry.whole and entry.used < time.time() - STALE_SECONDS:
                    _remove(entry.path)
            file = _unlocked(first)
            try:
                if file.about() != about:
                    os.ftruncate(file.fd, 0)
                    self._make_room(about.file_bytes)
                    file.create(about)
            except BaseException:
                file.path.unlink()
                file.close()
                raise
        return file

    def _make_room(self, nbytes: int) -> None:
        """Evict what has not been used for longest until so many bytes fit."""
        entries = self._scan()
        used, evictable = (sum(e.file_bytes for e in group) for group in (entries, [e for e in entries if not e.busy]))
        free = shutil.disk_usage(self.folder).free
        limit = min((used + free) // 2, LARGEST_LIMIT) if self._limit is None else self._limit
        if nbytes > limit - (used - evictable):
            in_use = f", and {in_units(used - evictable)} of that are in use" if used > evictable else ""
            raise _NoRoom(f"{in_units(nbytes)} needed, the limit of {self.folder} is {in_units(limit)}{in_use}")
        if nbytes > free + evictable:
            raise _NoRoom(f"{in_units(nbytes)} needed, and {in_units(free)} are free on the disk of {self.folder}")
        for entry in entries:
            if used + nbytes > limit or shutil.disk_usage(self.folder).free < nbytes:
                used -= entry.file_bytes if _remove(entry.path) else 0

    def _publish(self, file: SliceFile, about: About) -> np.ndarray:
        """Give a file that is whole its name, and map it. Where the slice came in twice, the first stays."""
        os.fsync(file.fd)
        with self._locked():
            there = self.find(about.name, about.nbytes)
            if there is not None:
                file.path.unlink()
                return there
            os.replace(file.path, self._path(about.name))
            _sync(self.folder)
            file.lock(exclusive=False)
            return file.map(about)


def _entry(file: SliceFile) -> Entry:
    stat, about = os.fstat(file.fd), file.about()
    name, kind = FILE.fullmatch(file.path.name).groups()
    whole, label, nbytes, done = kind == "slice", "damaged", 0, 0
    if about is not None:
        label, nbytes = about.label, about.nbytes
        sizes = (min(about.chunk_bytes, nbytes - start) for start in range(0, nbytes, about.chunk_bytes))
        done = sum(size for size, digest in zip(sizes, file.digests(about), strict=True) if digest)
    return Entry(file.path, name, label, nbytes, done, stat.st_size, stat.st_mtime, whole, not file.lock_at_once())


def _remove(path: Path) -> bool:
    """Remove a file, if no process has it open."""
    with suppress(FileNotFoundError), SliceFile(path) as file:
        if not file.lock_at_once():
            return False
        path.unlink()
    return True


def _unlocked(first: Path) -> SliceFile:
    """A file that nobody else writes, of this name or one like it: opened, made where there is none, and locked."""
    for number in count(1):
        file = SliceFile(first, os.O_RDWR | os.O_CREAT)
        if file.lock_at_once():
            return file
        file.close()
        first = first.with_name(f"{first.name.split('.')[0]}.{number}.part")


def _sync(folder: Path) -> None:
    """See to it that the folder's names survive a loss of power."""
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
