"""How much memory a model needs, how much there is, and what would make it fit."""

import os
import resource
import subprocess
import sys
from bisect import bisect_right
from collections.abc import Callable
from pathlib import Path

from dllama.errors import DllamaError, OutOfMemoryError
from dllama.formats.blocks import BLOCK, FloatType
from dllama.formats.config import ModelConfig
from dllama.formats.layout import tensor_kinds

# Python, numpy, numba, LLVM, the compiled kernels and the buffers of one batch.
RUNTIME_BYTES = 150_000_000

MAX_NODES = 64

LIMIT_VARIABLE = "DLLAMA_MEMORY_LIMIT"


def kv_bytes_per_token(config: ModelConfig, kv_type: FloatType, nodes: int = 1) -> int:
    """Bytes that one position takes in the KV caches of one node, all layers together.

    Each head's row is padded to whole blocks. Nodes share out whole kv heads: the count is that of the fullest node.
    """
    row = kv_type.row_bytes(-(-config.head_dim // BLOCK) * BLOCK)
    return 2 * config.n_layers * -(-config.n_kv_heads // nodes) * row


def needed_bytes(config: ModelConfig, context: int, kv_type: FloatType, nodes: int = 1) -> int:
    """Bytes of memory that running a model takes, on the node that holds most of it.

    Weights count once: those packed for the kernels take the place of the file's pages, which are let go, and the
    others are used where the file is mapped. Of the embedding only the rows that a full context can touch are read.
    Over several nodes every matrix is split evenly; norms and routers are not.
    """
    weights = min(config.vocab_size, context) * FloatType.F32.row_bytes(config.dim)
    for tensor, count, _ in tensor_kinds(config):
        if tensor.name != "embedding":
            weights += count * (tensor.nbytes if tensor.is_whole else -(-tensor.nbytes // nodes))
    return weights + context * kv_bytes_per_token(config, kv_type, nodes) + RUNTIME_BYTES


def largest_context(config: ModelConfig, kv_type: FloatType, memory: int, nodes: int = 1) -> int:
    """The longest context, up to the model's own, that fits into `memory` bytes; 0 where none does."""
    return bisect_right(range(1, config.seq_len + 1), memory, key=lambda n: needed_bytes(config, n, kv_type, nodes))


def require(
    config: ModelConfig, context: int, kv_type: FloatType, path: str | os.PathLike, adapter_bytes: int = 0
) -> None:
    """Raise OutOfMemoryError, saying what would fit, where the model at `path` needs more than is available, or more
    than adapters leave of it."""
    needed, available = needed_bytes(config, context, kv_type), available_bytes()
    if available is not None:
        available = max(0, available - adapter_bytes)
    if available is None or needed <= available:
        return
    beside = " beside the adapters" if adapter_bytes else ""
    raise OutOfMemoryError(
        f"{path}: {in_units(needed)} of memory needed for a context of {context} tokens ({needed} bytes), "
        f"{in_units(available)} available{beside} ({available} bytes); "
        f"{_what_fits(config, context, kv_type, available)}"
    )


def _what_fits(config: ModelConfig, context: int, kv_type: FloatType, memory: int) -> str:
    ways = []
    shorter = largest_context(config, kv_type, memory)
    if shorter:
        ways.append(f"--max-seq-len {shorter}")
    smaller = FloatType.Q80
    if kv_type is not smaller:
        if needed_bytes(config, context, smaller) <= memory:
            ways.append("--kv-float-type q80")
        elif not shorter and (both := largest_context(config, smaller, memory)):
            ways.append(f"--kv-float-type q80 --max-seq-len {both}")
    nodes = _first(range(2, MAX_NODES + 1), lambda n: needed_bytes(config, context, kv_type, n) <= memory)
    if nodes:
        ways.append(f"{nodes} nodes with this much memory each")
    return f"it fits with {', or '.join(ways)}" if ways else "a smaller model or more memory is needed"


def _first(numbers: range, holds: Callable[[int], bool]) -> int | None:
    return next((n for n in numbers if holds(n)), None)


def available_bytes() -> int | None:
    """Bytes that can still be used without swapping: what the system has, and at most what cgroups leave over.

    The environment variable DLLAMA_MEMORY_LIMIT (bytes) takes its place. None where the system does not say.
    """
    limit = os.environ.get(LIMIT_VARIABLE)
    if limit is not None:
        if not limit.isdecimal():
            raise DllamaError(f"{LIMIT_VARIABLE}={limit}: not a number of bytes")
        return int(limit)
    figures = [_system_bytes(), *cgroup_bytes(Path("/proc/self/cgroup"), Path("/sys/fs/cgroup"))]
    return min((figure for figure in figures if figure is not None), default=None)


def _system_bytes() -> int | None:
    if sys.platform == "darwin":  # what is free is not told in bytes; what is built in is an upper bound
        told = subprocess.run(["sysctl", "-n", "hw.memsize"], capture_output=True, text=True, check=False).stdout
        return int(told) if told.strip().isdecimal() else None
    return _field("/proc/meminfo", "MemAvailable:", 1024)


def cgroup_bytes(membership: Path, root: Path) -> list[int]:
    """What each limited cgroup around this process has left. Page cache in use counts as free: it can be dropped.

    membership: lines "id:controllers:path" as in /proc/self/cgroup; version 2 has an empty list of controllers.
    """
    left = []
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            base, names = root, ("memory.max", "memory.current", "")
        elif "memory" in controllers.split(","):
            base, names = root / "memory", ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_")
        else:
            continue
        group = base / path.lstrip("/")
        for folder in (group, *group.parents):
            left += _cgroup_left(folder, *names)
            if folder == base:
                break
    return left


def _cgroup_left(folder: Path, limit: str, usage: str, prefix: str) -> list[int]:
    numbers = [_read(folder / name).strip() for name in (limit, usage)]
    if not all(number.isdecimal() for number in numbers):  # no such group, or a limit of "max"
        return []
    cache = sum(_field(folder / "memory.stat", f"{prefix}{kind}_file", 1) or 0 for kind in ("active", "inactive"))
    return [max(0, int(numbers[0]) - int(numbers[1]) + cache)]


def _field(path: str | Path, name: str, unit: int) -> int | None:
    """The number after `name` in a file of "name number" lines, times `unit`; None where there is none."""
    words = (line.split() for line in _read(path).splitlines())
    return next((int(line[1]) * unit for line in words if line and line[0] == name), None)


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text()
    except OSError:
        return ""


def peak_rss_bytes() -> int:
    """The most memory that this process has had in use so far, mapped file pages included."""
    peak = _field("/proc/self/status", "VmHWM:", 1024)  # getrusage would count the program that started this one too
    if peak is not None:
        return peak
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def in_units(nbytes: int) -> str:
    """A size for people, in decimal units: "512 bytes", "3.2 MB", "4.24 GB"."""
    for unit, scale, digits in (("GB", 10**9, 2), ("MB", 10**6, 1), ("kB", 10**3, 0)):
        if nbytes >= scale:
            return f"{nbytes / scale:.{digits}f} {unit}"
    return f"{nbytes} bytes"
