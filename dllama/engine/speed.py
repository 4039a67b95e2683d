"""How fast this machine works through weights, for the plan."""

import time
from collections.abc import Sequence
from statistics import fmean

import numpy as np

from dllama.engine.pages import anonymous
from dllama.kernels import tags
from dllama.kernels.jit import jit
from dllama.kernels.packed import ACT_BYTES, ROWS, multiply_packed, packed_bytes
from dllama.kernels.team import Team, meet, take

COLUMNS = 4096
ITEM_GROUPS = 2
NBYTES = 96 << 20
"""More than caches hold, and a tenth of a second on a weak device."""
SECONDS = 0.12
"""How long to measure: some turns of a container that is let run for a part of each tenth of a second."""
LONG_SECONDS = 1.0
"""How long where that turns out to be so, or others use the machine too."""
STEADY = 0.8
"""A machine is steady where so much of the time is spent as if each pass were the fastest."""
STOPPED = 3
"""It was stopped in between where a pass took so many times as long as the fastest."""


@jit
def _read(thread, sync, threads, weight, w, groups, columns, group_bytes, x, out):
    item = take(sync, 0)
    while item * ITEM_GROUPS < groups:
        source = w + item * ITEM_GROUPS * group_bytes
        multiply_packed(weight, source, ITEM_GROUPS, columns, x, 0, 1, out + 4 * ROWS * ITEM_GROUPS * thread, 0)
        item = take(sync, 0)
    meet(sync, threads)


def read_speed(team: Team) -> float:
    """Bytes of Q40 weights that the team multiplies in a second, measured on memory of its own."""
    group_bytes = packed_bytes(tags.Q40, ROWS, COLUMNS)
    groups = NBYTES // group_bytes // ITEM_GROUPS * ITEM_GROUPS
    weights = anonymous(groups * group_bytes, huge=True)
    weights[:] = 1
    acts = np.zeros(COLUMNS // 32 * ACT_BYTES, np.uint8)
    out = np.zeros((team.nthreads, ROWS * ITEM_GROUPS), np.float32)
    args = tags.Q40, weights.ctypes.data, groups, COLUMNS, group_bytes, acts.ctypes.data, out.ctypes.data
    team.run(_read, team.sync, team.nthreads, *args)  # compiles
    passes, limit = [], SECONDS
    while sum(passes) < limit:
        passes.append(_seconds(team, args))
        if sum(passes) >= SECONDS and len(passes) * min(passes) < STEADY * sum(passes):
            limit = LONG_SECONDS
    return len(weights) / _mean(passes)


def _mean(passes: Sequence[float]) -> float:
    """Of seconds, from the end of one stop to the end of the last: these are whole turns, however long the machine's
    turns are. Of all seconds where the stops lie close together, and so are no turns."""
    stops = [i for i, seconds in enumerate(passes) if seconds > STOPPED * min(passes)]
    whole = passes[stops[0] + 1 : stops[-1] + 1] if stops else []
    return fmean(whole if 2 * sum(whole) > sum(passes) else passes)


def _seconds(team: Team, args: tuple) -> float:
    start = time.perf_counter()
    team.run(_read, team.sync, team.nthreads, *args)
    return time.perf_counter() - start
