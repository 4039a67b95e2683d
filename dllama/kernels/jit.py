"""Compilation: numba's options in one place, and a disk cache that cannot go stale.

numba keys its cache by the file a function stands in, not by what that function calls, and the kernels call across
files. So the cache folder's name holds a hash of all compiled sources, of the chosen kernels and of the
compiler's versions: a change of any of them starts a fresh folder.
"""

import hashlib
import os
import tempfile
from pathlib import Path

import llvmlite
import numba
from numba.core import config

from dllama.folders import cache_folder
from dllama.kernels import arm, cpu, isa, x86

ENGINE = ("stages.py", "experts.py", "adapters.py", "segments.py", "halves.py")
"""What is compiled outside of this folder."""

_ISAS = {kind.name: kind for kind in (x86.Avx512, x86.Avx2, arm.NeonDotprod, arm.Neon, isa.Isa)}

ISA = _ISAS[cpu.select()]()
"""The kernels' instruction set, chosen once for the process."""


def _cache_folder() -> Path:
    compiler = numba.__version__, llvmlite.__version__, config.CPU_NAME, config.CPU_FEATURES
    digest = hashlib.sha256(repr(compiler).encode())
    kernels = Path(__file__).parent
    engine = (kernels.parent / "engine" / name for name in ENGINE)
    for source in sorted([*kernels.glob("*.py"), *engine]):
        digest.update(source.read_bytes())
    base = Path(os.environ.get("NUMBA_CACHE_DIR") or cache_folder())
    return base / f"kernels-{ISA.name}-{digest.hexdigest()[:16]}"


def _is_writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError:
        return False
    return True


CACHE = _cache_folder()
KEEPS = _is_writable(CACHE)
"""Whether compiled kernels can be kept. Without this numba would keep them beside the sources, where they go stale,
or refuse to import."""


def is_compiled(*forms: str) -> bool:
    """Whether the kernels for these forms (weights, activations, KV cache, and what else there is) lie in the cache."""
    return KEEPS and _marker(forms).exists()


def mark_compiled(*forms: str) -> None:
    """Notes that they do."""
    if KEEPS:
        _marker(forms).touch()


def _marker(forms: tuple[str, ...]) -> Path:
    return CACHE / ("-".join(forms) + ".compiled")


def jit(function=None, *, inline=False):
    """Compiles a function without Python's lock, with fast (reassociating) float arithmetic.

    Functions that the engine calls are cached on disk; ``inline`` ones become part of those that call them.
    """
    if function is None:
        return lambda f: jit(f, inline=inline)
    options = {"nogil": True, "fastmath": {"reassoc", "nsz", "arcp", "contract", "afn"}, "error_model": "numpy"}
    if inline:
        return numba.njit(function, inline="always", **options)
    before, config.CACHE_DIR = config.CACHE_DIR, str(CACHE)
    try:
        return numba.njit(function, cache=KEEPS, **options)
    finally:
        config.CACHE_DIR = before


def compiled(function, *args):
    """What a jitted function is compiled to for arguments like these; it does not look at their types again.

    A call of the function itself finds out the types of its arguments first, which for each tag takes as long as a
    short kernel.
    """
    kinds = tuple(map(numba.typeof, args))
    function.compile(kinds)
    return function.get_overload(kinds)
