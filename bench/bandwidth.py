"""How fast can this machine read memory? The limit of decoding, which reads every weight once a token.

    python -m bench.bandwidth --threads 2

Each thread sums its own contiguous share of a buffer far larger than the caches. Three kinds of memory are read:

- ``anonymous``: ordinary pages, huge pages refused. This is *the read bandwidth* that other measures refer to.
- ``huge pages``: the same with transparent huge pages asked for, which saves page-table walks.
- ``file``: a memory-mapped file in the page cache, as the weights of a model are.
"""

import argparse
import mmap
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass

import numpy as np
from numba import njit

from bench.report import print_table, save

GIB = 1 << 30
KINDS = ("anonymous", "huge pages", "file")


@dataclass(frozen=True)
class Bandwidth:
    """Bytes a second in units of 1e9, over several passes of the same buffer."""

    kind: str
    threads: int
    best: float
    median: float


@njit(nogil=True, cache=True)
def _sum(words):
    # Integer addition may be reordered, so LLVM makes it as wide and as unrolled as the CPU allows.
    total = np.int64(0)
    for i in range(words.size):
        total += words[i]
    return total


@contextmanager
def _buffer(kind: str, nbytes: int) -> Iterator[np.ndarray]:
    """An int64 array over `nbytes` of memory of the given kind, every page of it present."""
    with tempfile.TemporaryFile() as file:
        if kind == "file":
            block = np.arange(1 << 20, dtype=np.int64).tobytes()
            for _ in range(nbytes // len(block)):
                file.write(block)
            file.flush()
            memory = mmap.mmap(file.fileno(), nbytes, access=mmap.ACCESS_READ)
            words = np.frombuffer(memory, np.int64)
        else:
            memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE if kind == "huge pages" else mmap.MADV_NOHUGEPAGE)
            words = np.frombuffer(memory, np.int64)
            words[:] = 1
        _sum(words)
        yield words
        del words  # the map is freed with its last view


def read_bandwidth(threads: int, kind: str = "anonymous", nbytes: int = GIB, passes: int = 12) -> Bandwidth:
    """Measure reading `nbytes` (a multiple of 8 MiB) of memory of one of KINDS with `threads` threads."""
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {', '.join(KINDS)}, not {kind!r}")
    with _buffer(kind, nbytes) as words, ThreadPoolExecutor(threads) as pool:
        shares = np.array_split(words, threads)
        rates = []
        for _ in range(passes):
            start = time.perf_counter()
            list(pool.map(_sum, shares))
            rates.append(nbytes / (time.perf_counter() - start) / 1e9)
        del shares, words
    return Bandwidth(kind, threads, max(rates), statistics.median(rates))


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast memory can be read.")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="most threads to read with")
    parser.add_argument("--gib", type=int, default=1, help="size of the buffer, GiB")
    options = parser.parse_args()
    results = [
        read_bandwidth(threads, kind, options.gib * GIB) for kind in KINDS for threads in sorted({1, options.threads})
    ]
    print_table(
        ("memory", "threads", "best GB/s", "median GB/s"),
        [(r.kind, r.threads, f"{r.best:.1f}", f"{r.median:.1f}") for r in results],
    )
    save("bandwidth", {"bandwidth_gb_s": [asdict(r) for r in results]})


if __name__ == "__main__":
    main()
