"""The kernels' tests once more for every other instruction set that this machine can run.

An instruction set is chosen once for a process, so each has one of its own.
"""

import os
import subprocess
import sys
import tempfile
from contextlib import ExitStack
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


@pytest.fixture(scope="module")
def runs():
    """All of them at once: most of a run is its compiler, which takes one core."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", str(FOLDER)]
    with ExitStack() as stack:
        started = {}
        for name in others():
            output = stack.enter_context(tempfile.TemporaryFile("w+"))
            environment = {**os.environ, "DLLAMA_KERNELS": name}
            process = subprocess.Popen(command, env=environment, cwd=FOLDER.parents[1], stdout=output, stderr=output)
            started[name] = stack.enter_context(process), output
            stack.callback(process.kill)
        yield started


@pytest.mark.parametrize("name", others())
def test_kernels_of(runs, name):
    process, output = runs[name]
    status = process.wait(TEN_MINUTES)
    output.seek(0)
    assert status == 0, f"{name}:\n{output.read()}"
