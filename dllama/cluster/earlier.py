"""What nodes were measured to be at earlier starts of a cluster.

No two measurements of a device agree, and shares follow from them: with new ones at each start every node would hold a
slightly other slice, and all weights would travel again. So a root goes by the figures that it has gone by before, for
as long as what is measured is about the same.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median

from dllama.cluster.node import NodeSpec
from dllama.engine.memory import in_units
from dllama.errors import DllamaError, FileError
from dllama.folders import cache_folder
from dllama.formats.files import AtomicFile, open_regular

CHANGED = 2.0
"""A node that is so many times as fast, or as slow, is another one, or does something else beside."""
DRIFTED = 1.1
"""Shares are so far off at most in the long run: where the middle of the last measurements is further from the speed
that is gone by, that was a bad one."""
MEASUREMENTS = 5
"""So many of a node's speed are kept, and have a middle to go by."""
DAY = 86400.0
"""Seconds for which a root does without measuring itself again, for which whoever waits for the first token waits."""
MEMORY, LINK, LATENCY_SECONDS = 1.2, 2.0, 0.1e-3
"""Factors, or what comes on top, by which other figures may differ and be the same."""
MOST_NODES = 256
MOST_BYTES = 1 << 17


@dataclass(frozen=True)
class _Figures:
    """What is known of a node: the speed that is gone by, the last that were measured, and when the last of these was,
    in seconds since 1970; the rest as in `NodeSpec`."""

    read_speed: float
    measured: list[float]
    when: float
    memory: int | None
    bandwidth: float
    latency: float


class Earlier:
    """What was measured of nodes, by name and number of threads, in a file in the user's cache folder. Where the file
    cannot be read or written, each start is the first.

    notify: called with a line for people where the speed that is gone by is another one now
    """

    def __init__(self, notify: Callable[[str], None], path: Path | None = None):
        self._notify, self._path = notify, path or cache_folder() / "nodes.json"

    def speed(self, node: NodeSpec) -> float | None:
        """What was measured of a node within the last DAY; None where nothing was."""
        known = self._read().get(_name(node))
        return known.measured[-1] if known is not None and 0 <= time.time() - known.when < DAY else None

    def settled(self, nodes: Sequence[NodeSpec]) -> list[NodeSpec]:
        """Nodes that have just been measured, with the figures that they had earlier, as far as these still hold. None
        is taken to have more memory than it has."""
        before = self._read()
        known = dict(before)
        settled = [self._settle(node, known) for node in nodes]
        if known != before:
            self._write(known)
        return settled

    def _settle(self, node: NodeSpec, known: dict[str, _Figures]) -> NodeSpec:
        name, now = _name(node), node.read_speed
        old = known.pop(name, _Figures(now, [], 0.0, node.memory, node.bandwidth, node.latency))
        speed, measured, when = old.read_speed, old.measured, old.when
        if now not in measured:  # a root may plan again, and a node not have been measured since
            measured, when = [*measured, now][-MEASUREMENTS:], time.time()
        if not _near(now, speed, CHANGED):
            measured, speed = [now], now
        elif len(measured) == MEASUREMENTS and not _near(median(measured), speed, DRIFTED):
            speed = median(measured)
        if speed != old.read_speed:
            self._notify(
                f"{node.name} works through {in_units(speed)} of weights a second, not {in_units(old.read_speed)} "
                "as it was taken for: shares are dealt anew"
            )
        memory = node.memory
        if memory is not None and old.memory is not None and old.memory <= memory <= MEMORY * old.memory:
            memory = old.memory
        bandwidth = old.bandwidth if _near(node.bandwidth, old.bandwidth, LINK) else node.bandwidth
        latency = old.latency if _near(node.latency, old.latency, LINK, LATENCY_SECONDS) else node.latency
        known[name] = _Figures(
            speed, measured, when, memory, bandwidth, latency
        )  # those that have something new come last
        return replace(node, read_speed=speed, memory=memory, bandwidth=bandwidth, latency=latency)

    def _read(self) -> dict[str, _Figures]:
        try:
            with open_regular(self._path) as file:
                known = json.loads(file.read(MOST_BYTES))
            return {name: _checked(name, **figures) for name, figures in known.items()}
        except (DllamaError, OSError, ValueError, TypeError, AttributeError):  # it says something else
            return {}

    def _write(self, known: dict[str, _Figures]) -> None:
        some = list(known.items())[-MOST_NODES:]
        text = json.dumps({name: asdict(figures) for name, figures in some}, indent=1).encode()
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with AtomicFile(self._path, len(text)) as file:
                file.write(text)
        except (FileError, OSError):
            pass


def _name(node: NodeSpec) -> str:
    return f"{node.name} {node.threads}"


def _near(now: float, old: float, factor: float, slack: float = 0.0) -> bool:
    return old / factor - slack <= now <= old * factor + slack


def _checked(name: str, **figures) -> _Figures:
    """Raises PlanError and TypeError for what no node can have."""
    found = _Figures(**figures)
    if not isinstance(found.memory, int | None):
        raise TypeError("memory comes in whole bytes")
    if not found.measured or not isinstance(found.when, float):
        raise TypeError("no measurement, or none knows when")
    for speed in (found.read_speed, *found.measured):
        NodeSpec(name, speed, found.memory, 1, found.bandwidth, found.latency)
    return found
