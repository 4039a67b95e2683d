"""Made-up slices, and how they get into a cache."""

import os

import numpy as np

from dllama.cluster.slice_file import About
from dllama.cluster.transfer import chunk_digest

CHUNK = 10_000
SIZE = 10 * CHUNK - 77


def name_of(number: int) -> str:
    return f"{number:032x}"


def file_bytes(nbytes: int = SIZE) -> int:
    return About("", "", nbytes, CHUNK).file_bytes


def slice_of(number: int, nbytes: int = SIZE) -> np.ndarray:
    """The bytes of a made-up slice."""
    return np.random.default_rng(number).integers(0, 256, nbytes, np.uint8)


def send(incoming, data, indexes=None) -> None:
    """Give the transfer these chunks, by default those that it does not hold."""
    wanted = [i for i, digest in enumerate(incoming.held) if not digest] if indexes is None else indexes
    for index in wanted:
        chunk = data[index * CHUNK : (index + 1) * CHUNK]
        incoming.write(index, chunk, chunk_digest(chunk))


def put(cache, number: int, used: float | None = None) -> None:
    """Have a slice in the cache, used last at this time."""
    with cache.receive(name_of(number), SIZE, CHUNK, f"slice {number}") as incoming:
        send(incoming, slice_of(number))
        incoming.finish()
    if used is not None:
        os.utime(cache.folder / f"{name_of(number)}.slice", (used, used))
