"""A checkpoint -> a `.m` file and its manifest, a few megabytes of rows at a time.

The checkpoint is read once, in the order of its files: what is read goes into the files' hashes and is converted, and
each tensor is written to its own place in the model file.
"""

import contextlib
import itertools
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np

from converter.checkpoint import Checkpoint, Source
from converter.hashed import HashedFile
from converter.memory import keep_freed_memory
from converter.quantise import HALVES, quantise
from converter.recognise import open_checkpoint
from dllama import __version__
from dllama.errors import FormatError
from dllama.formats import FloatType, ModelConfig, ModelWriter, TensorInfo, tensor_layout
from dllama.formats.files import refuse_overwriting
from dllama.formats.imatrix import read_imatrix
from dllama.formats.manifest import ManifestWriter, manifest_path
from dllama.formats.tensor import Read, read_bytes

CHUNK_BYTES = 2 << 20  # float32 rows that one thread holds at a time
KEPT_BYTES = 64 << 20  # of freed memory, for the chunks that follow
THREADS = min(8, os.cpu_count() or 1)

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""Label and number of bytes to do -> a context with a function to call with the bytes done since its last call."""


@dataclass(frozen=True)
class Settings:
    """How to store the weights.

    imatrix: an importance matrix, by which errors of Q40 are weighed; None weighs all alike
    reference: write the reference quantiser's Q40 in place of that of least error
    allow_non_finite: write NaN and infinities as 0, where they otherwise are an error
    """

    weight_type: FloatType = FloatType.Q40
    imatrix: Path | None = None
    reference: bool = False
    allow_non_finite: bool = False

    def quantiser(self, copied: Set[bool]) -> str:
        """How values were rounded, for the manifest; copied: as in Tally"""
        if not self.weight_type.is_quantized:
            return "none"
        if copied == {True}:
            return "copied"
        rounded = "least error by importance" if self.imatrix else "least error"
        if self.weight_type is not FloatType.Q40 or self.reference:
            rounded = "reference"
        return f"{rounded}, some copied" if copied == {True, False} else rounded


@dataclass(frozen=True)
class Result:
    """What was written. zeroed: how many values of which tensor were not finite and became 0."""

    kind: str
    config: ModelConfig
    zeroed: dict[str, int]


class Chunk(NamedTuple):
    """Some rows of a tensor as they are stored, uint8 [rows, row_bytes], and what was read for them: path, offset and
    bytes, uint8."""

    rows: np.ndarray
    pieces: list[tuple[Path, int, np.ndarray]]


@dataclass
class Tally:
    """What the threads note as they work.

    zeroed: names of tensors and how many values of a chunk were not finite and became 0
    copied: whether blocks were copied: both where some were and some not
    """

    zeroed: list[tuple[str, int]] = field(default_factory=list)
    copied: set[bool] = field(default_factory=set)


@contextlib.contextmanager
def silent(label: str, total: int) -> Iterator[Callable[[int], None]]:
    """Progress that nobody sees."""
    yield lambda nbytes: None


def convert(
    path: str | os.PathLike,
    out: str | os.PathLike,
    settings: Settings | None = None,
    *,
    seq_len: int | None = None,
    form: str | None = None,
    progress: Progress = silent,
) -> Result:
    """Write the checkpoint at ``path`` as the model file ``out``, with a manifest beside it.

    seq_len: a shorter context than the model's own, or None
    form: what ``path`` holds, a key of recognise.FORMS; None finds out
    Raises FileError (FormatError) naming the file and the reason; ``out`` then is as it was. Only where the manifest
    fails at the very end there is neither file.
    """
    settings = settings or Settings()
    keep_freed_memory(KEPT_BYTES)
    checkpoint = open_checkpoint(path, settings.weight_type, seq_len, form)
    importance = _importance(settings.imatrix, checkpoint.config)
    files = checkpoint.files + ([settings.imatrix] if settings.imatrix else [])
    for written in (out, manifest_path(out)):
        refuse_overwriting(written, files)
    tally = Tally()
    with ManifestWriter(out) as manifest:
        try:
            writer = ModelWriter(out, checkpoint.config)
        except ValueError as error:
            raise FormatError(checkpoint.files[0], str(error)) from None
        with writer, ThreadPoolExecutor(THREADS) as pool, ThreadPoolExecutor(1) as hasher:
            hashed = {path: HashedFile(path) for path in files}
            tensors = _in_file_order(checkpoint)
            jobs = [
                _jobs(info, source, settings, importance.get((info.name, info.layer)), tally)
                for info, source in tensors
            ]
            chunks = _in_order(pool, itertools.chain.from_iterable(jobs))
            with progress(f"Writing {Path(out).name}", sum(info.nbytes for info, _ in tensors)) as report:
                for (info, _), own in zip(tensors, jobs, strict=True):
                    noted = _noted(itertools.islice(chunks, len(own)), hashed, hasher, report)
                    writer.write_chunks(info.name, info.layer, noted)
            hashes = [
                {"name": path.name, "bytes": file.nbytes, "sha256": file.finish()} for path, file in hashed.items()
            ]
        try:
            manifest.write(_manifest(checkpoint, settings, hashes, tally.copied))
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(os.path.realpath(out))
            raise
    counts = Counter()
    for name, count in tally.zeroed:
        counts[name] += count
    return Result(checkpoint.kind, checkpoint.config, dict(counts))


def _importance(imatrix: Path | None, config: ModelConfig) -> Mapping[tuple[str, int | None], np.ndarray]:
    """For each matrix (name, layer), float32 [columns]: how much an error counts in each column of a row."""
    return {} if imatrix is None else read_imatrix(imatrix, tensor_layout(config)).means


def _manifest(checkpoint: Checkpoint, settings: Settings, hashes: list[dict], copied: Set[bool]) -> dict:
    """Nothing of the machine or the time: it too is the same at every run."""
    return {
        "source": {"kind": checkpoint.kind, "name": checkpoint.path.resolve().name, "files": hashes},
        "weights": settings.weight_type.name.lower(),
        "quantiser": settings.quantiser(copied),
        "converter": f"dllama {__version__}",
    }


def _in_file_order(checkpoint: Checkpoint) -> list[tuple[TensorInfo, Source]]:
    """The tensors as they follow in the checkpoint's files."""
    order = {path: i for i, path in enumerate(checkpoint.files)}
    return sorted(checkpoint.sources, key=lambda pair: (order[pair[1].path], pair[1].offset))


def _jobs(
    info: TensorInfo,
    source: Source,
    settings: Settings,
    importance: np.ndarray | None,
    tally: Tally,
) -> list[Callable[[], Chunk]]:
    """One job for each chunk of rows: copy, or read and quantise."""
    step = max(1, CHUNK_BYTES // (4 * info.columns * source.unit)) * source.unit

    def job(start: int, stop: int) -> Chunk:
        pieces = []

        def read(path: Path, offset: int, count: int) -> np.ndarray:
            pieces.append((path, offset, read_bytes(path, offset, count)))
            return pieces[-1][2]

        try:
            return Chunk(stored(start, stop, read), pieces)
        except ValueError as error:
            remedy = " (--allow-non-finite writes them as 0)" if "not finite" in str(error) else ""
            raise FormatError(source.path, f"tensor {source.name} has {error}{remedy}") from None

    def stored(start: int, stop: int, read: Read) -> np.ndarray:
        raw = copied(start, stop, read)
        if info.float_type.is_quantized:
            tally.copied.add(raw is not None)
        if raw is not None:
            return raw
        if settings.allow_non_finite:
            rows, count = _finite(source.rows(start, stop, read))
            if count:
                tally.zeroed.append((source.name, count))
            return quantised(rows, "F32")
        if source.dtype in HALVES:
            return quantised(source.raw(start, stop, read).view("<u2"), source.dtype)
        return quantised(source.rows(start, stop, read), "F32")

    def copied(start: int, stop: int, read: Read) -> np.ndarray | None:
        try:
            return source.stored(start, stop, info.float_type, read)
        except ValueError:
            if settings.allow_non_finite:
                return None
            raise

    def quantised(numbers: np.ndarray, dtype: str) -> np.ndarray:
        return quantise(numbers, info.float_type, dtype=dtype, importance=importance, reference=settings.reference)

    return [partial(job, start, min(start + step, info.rows)) for start in range(0, info.rows, step)]


def _finite(rows: np.ndarray) -> tuple[np.ndarray, int]:
    """The rows with 0 for what is not finite, and how many values that was."""
    wrong = ~np.isfinite(rows)
    count = int(wrong.sum())
    return (np.where(wrong, np.float32(0), rows) if count else rows), count


def _in_order(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], Chunk]]) -> Iterator[Chunk]:
    """The jobs' results in order, with only a few jobs more than threads begun at a time."""
    begun = deque()
    for job in jobs:
        begun.append(pool.submit(job))
        if len(begun) > THREADS:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _noted(
    chunks: Iterable[Chunk],
    hashed: Mapping[Path, HashedFile],
    hasher: ThreadPoolExecutor,
    report: Callable[[int], None],
) -> Iterator[np.ndarray]:
    """The rows of each chunk, which are written while the bytes read for them go into their files' hashes; reported
    when both are done.

    hasher: its one thread takes the bytes in their order
    """
    for rows, pieces in chunks:
        adding = [hasher.submit(hashed[path].add, offset, data) for path, offset, data in pieces]
        yield rows
        for done in adding:
            done.result()
        report(rows.nbytes)
