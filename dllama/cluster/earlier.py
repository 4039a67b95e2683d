"""What nodes were measured to be at earlier starts of a cluster.

No two measurements of a device agree, and shares follow from them: with new ones at each start every node would hold a
slightly other slice, and all weights would travel again. So a root goes by the figures that it has gone by before. All
of them are of one time, at which the nodes were measured together (see ``speeds``), and hold for a day; then, or when a
node comes or changes, they are measured again, and gone by if the nodes are otherwise beside each other than before.
"""

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from dllama.cluster.node import NodeSpec
from dllama.engine.memory import in_units
from dllama.errors import DllamaError, FileError
from dllama.folders import cache_folder
from dllama.formats.files import AtomicFile, open_regular

CHANGED = 2.0
"""A worker that by its own account is so many times as fast, or as slow, is another one, or has other work beside."""
NOISE = 1.1
"""By so much the speeds of nodes beside each other differ from one measurement to the next: shares stay as they are."""
DAY = 86400.0
"""Seconds until nodes are measured again, for which whoever waits for the first token waits."""
MEMORY, LINK, LATENCY_SECONDS = 1.2, 2.0, 0.1e-3
"""Factors, or what comes on top, by which other figures may differ and be the same."""
MOST_NODES = 256
MOST_BYTES = 1 << 17


@dataclass(frozen=True)
class _Figures:
    """What is known of a node: the speed that is gone by, and what it told of itself when that was measured, None for
    a root; when that was, in seconds since 1970; the rest as in `NodeSpec`."""

    read_speed: float
    alone: float | None
    when: float
    memory: int | None
    bandwidth: float
    latency: float


class Earlier:
    """What was measured of nodes, by name and number of threads, in a file in the user's cache folder. Where the file
    cannot be read or written, each start is the first.

    notify: called with a line for people where other speeds are gone by now
    """

    def __init__(self, notify: Callable[[str], None], path: Path | None = None):
        self._notify, self._path = notify, path or cache_folder() / "nodes.json"

    def settled(self, nodes: Sequence[NodeSpec], measure: Callable[[], Sequence[float]]) -> list[NodeSpec]:
        """Nodes with the figures that they had earlier, as far as these still hold; none is taken to have more memory
        than it has.

        nodes: their speeds are what they tell of themselves, None for a root
        measure: called where they have to be measured together; returns the speeds of all, in bytes a second
        """
        known = self._read()
        before = [known.get(_name(node)) for node in nodes]
        if all(before) and _hold(nodes, before):
            speeds, when = [(old.read_speed, old.alone) for old in before], before[0].when
        else:
            together, when = self._measured(nodes, before, measure()), time.time()
            speeds = [(speed, node.read_speed) for speed, node in zip(together, nodes, strict=True)]
        settled = [_settled(node, old, speed) for node, old, (speed, _) in zip(nodes, before, speeds, strict=True)]
        figures = {
            _name(node): _Figures(*of_one, when, node.memory, node.bandwidth, node.latency)
            for node, of_one in zip(settled, speeds, strict=True)
        }
        if any(known.get(name) != each for name, each in figures.items()):
            self._write({name: each for name, each in known.items() if name not in figures} | figures)
        return settled

    def _measured(
        self, nodes: Sequence[NodeSpec], before: Sequence[_Figures | None], now: Sequence[float]
    ) -> Sequence[float]:
        """The speeds to go by: those of before, where beside each other they are the same."""
        if not all(before):
            return now
        earlier = [old.read_speed for old in before]
        scale = sum(now) / sum(earlier)
        if all(_near(a, scale * b, NOISE) for a, b in zip(now, earlier, strict=True)):
            return earlier
        others = [
            f"{node.name} {in_units(a)} (taken for {in_units(b)})"
            for node, a, b in zip(nodes, now, earlier, strict=True)
        ]
        self._notify(
            f"shares are dealt anew, as nodes work through other amounts of weights a second: {', '.join(others)}"
        )
        return now

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


def _hold(nodes: Sequence[NodeSpec], before: Sequence[_Figures]) -> bool:
    """Whether earlier speeds can be gone by: they were measured together and not long ago, and no node has changed."""
    for node, old in zip(nodes, before, strict=True):
        now, alone = node.read_speed, old.alone
        if now != alone and (now is None or alone is None or not _near(now, alone, CHANGED)):
            return False
    return len({old.when for old in before}) == 1 and 0 <= time.time() - before[0].when < DAY


def _settled(node: NodeSpec, old: _Figures | None, speed: float) -> NodeSpec:
    if old is None:
        return replace(node, read_speed=speed)
    memory = node.memory
    if memory is not None and old.memory is not None and old.memory <= memory <= MEMORY * old.memory:
        memory = old.memory
    bandwidth = old.bandwidth if _near(node.bandwidth, old.bandwidth, LINK) else node.bandwidth
    latency = old.latency if _near(node.latency, old.latency, LINK, LATENCY_SECONDS) else node.latency
    return replace(node, read_speed=speed, memory=memory, bandwidth=bandwidth, latency=latency)


def _checked(name: str, **figures) -> _Figures:
    """Raises PlanError and TypeError for what no node can have."""
    found = _Figures(**figures)
    if not isinstance(found.memory, int | None):
        raise TypeError("memory comes in whole bytes")
    if not isinstance(found.when, float) or found.read_speed is None:
        raise TypeError("no measurement, or none knows when")
    for speed in (found.read_speed, found.alone):
        NodeSpec(name, speed, found.memory, 1, found.bandwidth, found.latency)
    return found
