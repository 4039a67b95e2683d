"""What makes two files of a model the same model, and two slices the same slice."""

import hashlib
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from dllama.cluster.share import Share
from dllama.errors import FileError
from dllama.folders import cache_folder
from dllama.formats import ModelFile
from dllama.formats.files import AtomicFile, open_regular, reason

DIGEST_BYTES = 16
PIECE_BYTES = 64 << 20
READ_BYTES = 1 << 20
TREE = {"fanout": 0, "depth": 2, "leaf_size": PIECE_BYTES, "inner_size": 64}
"""BLAKE2b's tree of one level (section 2.10 of its specification): pieces are hashed on their own, by any thread."""

SLICE_FORM = b"slice 1"
"""Stands for how a slice's stream is made of its share: another form has other names."""


@dataclass(frozen=True)
class FileState:
    """What tells a file from the one that was there before."""

    inode: int
    nbytes: int
    mtime_ns: int

    @classmethod
    def of(cls, stat: os.stat_result) -> "FileState":
        return cls(stat.st_ino, stat.st_size, stat.st_mtime_ns)


def unchanged(model: ModelFile) -> bool:
    """Whether the path still leads to the file that was opened, and nobody has written to that since."""
    try:
        return FileState.of(os.stat(model.path)) == FileState.of(model.stat)
    except OSError:
        return False


def require_unchanged(model: ModelFile) -> None:
    """FileError where `unchanged` says no."""
    if not unchanged(model):
        raise FileError(model.path, "the model has changed on disk since it was opened; start again")


def model_digest(model: ModelFile, progress: Callable[[int, int], None] = lambda done, total: None) -> bytes:
    """BLAKE2b of the whole file, 16 bytes: the same on every machine for the same model.

    It is remembered for the file's path, size, inode and time of change, so that only the first call reads the file,
    with two threads and in little memory. ``progress(done, total)`` is called with bytes. Raises FileError for a file
    that cannot be read or that changed since it was opened.
    """
    require_unchanged(model)
    note = _Note(model)
    digest = note.read()
    if digest is None:
        digest = _hash(model, progress)
        require_unchanged(model)
        note.write(digest)
    return digest


def _hash(model: ModelFile, progress: Callable[[int, int], None]) -> bytes:
    """The file is read, not mapped: its pages stay with the system, and a file cut short is an error."""
    root = hashlib.blake2b(digest_size=DIGEST_BYTES, node_depth=1, last_node=True, **TREE)
    pieces = range(-(-model.nbytes // PIECE_BYTES))
    with open_regular(model.path) as file, ThreadPoolExecutor(2) as threads:
        try:
            leaves = threads.map(lambda piece: _leaf(file.fileno(), piece, piece == pieces[-1]), pieces)
            for piece, digest in enumerate(leaves):
                root.update(digest)
                progress(min((piece + 1) * PIECE_BYTES, model.nbytes), model.nbytes)
        except OSError as error:
            raise FileError(model.path, reason(error)) from None
    return root.digest()


def _leaf(fd: int, piece: int, is_last: bool) -> bytes:
    leaf = hashlib.blake2b(digest_size=TREE["inner_size"], node_offset=piece, last_node=is_last, **TREE)
    buffer = memoryview(bytearray(READ_BYTES))
    for offset in range(piece * PIECE_BYTES, (piece + 1) * PIECE_BYTES, READ_BYTES):
        leaf.update(buffer[: os.preadv(fd, [buffer], offset)])
    return leaf.digest()


class _Note:
    """A small file that remembers the digest of one model file: in hexadecimal, then what it was computed of. One that
    says anything else is no note."""

    def __init__(self, model: ModelFile):
        path, state = os.fsencode(os.path.realpath(model.path)), FileState.of(model.stat)
        self._about = b" %d %d %d %s" % (state.inode, state.nbytes, state.mtime_ns, path)
        name = hashlib.blake2b(path, digest_size=DIGEST_BYTES).hexdigest()
        self._path = cache_folder() / "digests" / name

    def read(self) -> bytes | None:
        try:
            with open_regular(self._path) as file:
                note = file.read(1 << 16)
            digest = bytes.fromhex(note[: 2 * DIGEST_BYTES].decode())
        except (FileError, OSError, ValueError):
            return None
        return digest if note[2 * DIGEST_BYTES :] == self._about else None

    def write(self, digest: bytes) -> None:
        note = digest.hex().encode() + self._about
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with AtomicFile(self._path, len(note)) as file:
                file.write(note)
        except (FileError, OSError):  # then the next start has to read the model again
            pass


def slice_name(digest: bytes, share: Share) -> str:
    """The name of a share's slice, 32 hexadecimal digits: equal for equal parts of equal models, whoever holds them.

    digest: the model's
    """
    name = hashlib.blake2b(SLICE_FORM + digest, digest_size=DIGEST_BYTES)
    for part in (share.heads, share.ffn_blocks, share.vocab):
        name.update(part.start.to_bytes(8, "little") + part.stop.to_bytes(8, "little"))
    return name.hexdigest()


def slice_label(path: str | os.PathLike, share: Share) -> str:
    """What people may call a slice: the model's file name and the parts of it, counted from 0, ends not included."""
    parts = (("heads", share.heads), ("ffn blocks", share.ffn_blocks), ("vocabulary", share.vocab))
    return ", ".join([Path(path).name, *(f"{name} {part.start}-{part.stop}" for name, part in parts)])
