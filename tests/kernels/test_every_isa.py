"""The kernels' tests once more for every other instruction set that this machine can run.

An instruction set is chosen once for a process, so each has one of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dllama.kernels import cpu
from dllama.kernels.jit import ISA

FOLDER = Path(__file__).parent
TEN_MINUTES = 600


def others() -> list[str]:
    """What this machine can run besides the kernels of this process.

    Nothing where kernels are forced, as in the processes started here, or the CPU is named by hand, as in emulation.
    """
    if os.environ.get("DLLAMA_KERNELS") or os.environ.get("NUMBA_CPU_NAME"):
        return []
    found, here = cpu.features(), cpu.machine()
    return [
        name
        for name, needed in cpu.REQUIREMENTS.items()
        if name != ISA.name and cpu.MACHINES.get(name, here) == here and found.issuperset(needed)
    ]


@pytest.mark.parametrize("name", others())
def test_kernels_of(name):
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", str(FOLDER)]
    run = subprocess.run(
        command,
        env={**os.environ, "DLLAMA_KERNELS": name},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        timeout=TEN_MINUTES,
    )
    assert run.returncode == 0, f"{name}:\n{run.stdout}\n{run.stderr}"
