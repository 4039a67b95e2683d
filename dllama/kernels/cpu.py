"""What this CPU can do, and which kernels that selects.

The features come from the same source that the compiler uses: numba's own setting when there is one
(``NUMBA_CPU_NAME``/``NUMBA_CPU_FEATURES``, for cross and emulated runs), else LLVM's view of the host, and on Arm
also the kernel's hardware capabilities, which are right where ``/proc/cpuinfo`` is not (emulators, containers).
"""

import ctypes
import os
import platform

import llvmlite.binding as llvm
from numba.core import config

from dllama.errors import KernelError

# Name -> the LLVM features its instructions need; the first one that fits is taken.
REQUIREMENTS = {
    "avx512": ("avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "fma", "f16c"),
    "avx2": ("avx2", "fma", "f16c"),
    "neon-dotprod": ("neon", "dotprod"),
    "neon": ("neon",),
    "plain": (),
}
# What to tell LLVM when kernels are forced, so that not even its own vectoriser uses more than was asked for.
FORCED_CPU = {
    "avx512": ("cascadelake", ""),
    "avx2": ("haswell", ""),
    "neon-dotprod": ("cortex-a76", "+neon,+dotprod"),
    "neon": ("cortex-a72", "+neon"),
    "plain": ("generic", ""),
}
MACHINES = {"avx512": "x86_64", "avx2": "x86_64", "neon-dotprod": "aarch64", "neon": "aarch64"}

_AT_HWCAP = 16
_HWCAP_ASIMD, _HWCAP_ASIMDDP = 1 << 1, 1 << 20  # arch/arm64/include/uapi/asm/hwcap.h


def machine() -> str:
    """The architecture, one name for each: ``x86_64``, ``aarch64`` or what the system says."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def features() -> frozenset[str]:
    """LLVM's names of the features that compiled code may use."""
    if config.CPU_FEATURES is not None:
        return frozenset(f[1:] for f in config.CPU_FEATURES.split(",") if f.startswith("+"))
    if config.CPU_NAME == "generic":
        return frozenset()
    return _host_features() | _arm_capabilities()


def _host_features() -> frozenset[str]:
    return frozenset(name for name, there in llvm.get_host_cpu_features().items() if there)


def _arm_capabilities() -> set[str]:
    if machine() != "aarch64":
        return set()
    if platform.system() == "Darwin":
        return {"neon", "dotprod"}  # every Apple silicon CPU has both
    try:
        capabilities = ctypes.CDLL(None).getauxval(_AT_HWCAP)
    except (OSError, AttributeError):
        return set()
    return {name for name, bit in (("neon", _HWCAP_ASIMD), ("dotprod", _HWCAP_ASIMDDP)) if capabilities & bit}


def select() -> str:
    """The name of the kernels to use: ``DLLAMA_KERNELS`` where it is set, else the best this CPU can run.

    Raises KernelError for an unknown name or one whose instructions this CPU lacks.
    """
    forced = os.environ.get("DLLAMA_KERNELS", "").strip().lower()
    there = features()
    if not forced:
        ours = (name for name in REQUIREMENTS if MACHINES.get(name, machine()) == machine())
        best = next(name for name in ours if there.issuperset(REQUIREMENTS[name]))
        if config.CPU_FEATURES is None and not _host_features().issuperset(REQUIREMENTS[best]):
            _compile_for(best)  # LLVM does not know what the system does, and would abort over the instructions
        return best
    if forced not in REQUIREMENTS:
        raise KernelError(f"DLLAMA_KERNELS={forced}: no such kernels; choose one of {', '.join(REQUIREMENTS)}")
    missing = [f for f in REQUIREMENTS[forced] if f not in there]
    if MACHINES.get(forced, machine()) != machine():
        raise KernelError(f"DLLAMA_KERNELS={forced}: these kernels are for {MACHINES[forced]}, this is {machine()}")
    if missing:
        raise KernelError(f"DLLAMA_KERNELS={forced}: this CPU lacks {', '.join(missing)}")
    if config.CPU_FEATURES is None:
        _compile_for(forced)
    return forced


def _compile_for(name: str) -> None:
    config.CPU_NAME, config.CPU_FEATURES = FORCED_CPU[name]
