"""Whether this device is fit to be a node."""

import platform
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path

from dllama import __version__
from dllama.cluster.node import NodeSpec
from dllama.doctor.finding import Finding, State
from dllama.engine import memory
from dllama.engine.memory import in_units
from dllama.errors import OutOfMemoryError
from dllama.formats import FloatType, ModelFile

LIBRARIES = ("numba", "numpy", "pyzmq")
KV_TYPE = FloatType.F16
BUFFER_TYPE = FloatType.Q80


def system(node: str) -> Finding:
    """The machine and its word size."""
    try:
        board = Path("/proc/device-tree/model").read_text().strip("\0\n ")
    except OSError:
        board = ""
    text = ", ".join(filter(None, (platform.system(), platform.machine(), board)))
    if sys.maxsize > 1 << 32:
        return Finding(node, "system", State.OK, text, value=platform.machine())
    advice = "install a 64-bit system, such as Raspberry Pi OS (64-bit), on a board that takes one: Pi 3, 4, 5, Zero 2"
    return Finding(node, "system", State.WRONG, f"{text}: a 32-bit Python, which no kernels are for", advice)


def versions(node: str) -> Finding:
    """The package's version is the value: all nodes of a cluster need the same."""
    libraries = ", ".join(f"{name} {version(name)}" for name in LIBRARIES)
    text = f"dllama {__version__}, Python {platform.python_version()}, {libraries}"
    return Finding(node, "version", State.OK, text, value=__version__)


def kernels(node: str, model: ModelFile, cluster: bool) -> Iterator[Finding]:
    """What the CPU's features select, and whether it has been compiled, for a cluster's root or else for any node.
    Raises KernelError."""
    from dllama.engine.compiling import forms_of
    from dllama.kernels import cpu, jit

    name = jit.ISA.name
    needs = ", ".join(cpu.REQUIREMENTS[name])
    if needs:
        yield Finding(node, "kernels", State.OK, f"{name}, as the CPU has {needs}", value=name)
    else:
        text = f"{name}: the CPU has none of the instructions that the others need"
        yield Finding(node, "kernels", State.SLOW, text, "use a CPU with AVX2 or NEON", name)
    types = model.config, BUFFER_TYPE, KV_TYPE
    forms, exchanging = forms_of(*types), forms_of(*types, "exchange")
    if jit.is_compiled(*exchanging) or (not cluster and jit.is_compiled(*forms)):
        yield Finding(node, "compiled", State.OK, f"in {jit.CACHE}")
        return
    text = f"the kernels for {forms[0]} weights are not compiled yet: the first text will have to wait"
    advice = f"dllama inference {'--local-workers 1 ' if cluster else ''}--prompt Hello --steps 2"
    yield Finding(node, "compiled", State.SLOW, text, advice if jit.KEEPS else f"make {jit.CACHE} writable")


def speed(node: str) -> tuple[NodeSpec, Finding]:
    """This machine as the planner has to know it: its threads are put to work for a moment."""
    from dllama.engine.speed import read_speed
    from dllama.kernels.team import Team, usable_cpus

    threads = usable_cpus()
    measured = read_speed(Team(threads))
    text = f"{measured / 1e9:.1f} GB of weights a second with {threads} {'thread' if threads == 1 else 'threads'}"
    return (
        NodeSpec(node, measured, memory.available_bytes(), threads),
        Finding(node, "speed", State.OK, text, value=measured),
    )


def memory_alone(node: str, model: ModelFile, context: int) -> Finding:
    """Whether this machine holds the model by itself; the value is what is free."""
    free = memory.available_bytes()
    try:
        memory.require(model.config, context, KV_TYPE, model.path)
    except OutOfMemoryError as error:
        return Finding(node, "memory", State.WRONG, str(error), "share the model out: --workers", free)
    needed = in_units(memory.needed_bytes(model.config, context, KV_TYPE))
    text = f"{model.path.name} needs {needed}, and {'?' if free is None else in_units(free)} is available"
    return Finding(node, "memory", State.OK, text, value=free)
