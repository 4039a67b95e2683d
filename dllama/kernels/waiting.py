"""Waiting for a message in compiled code: how long to ask for it again and again, and when to leave that to the system.

On a fast network the answer is on its way, and to be woken up for it takes as long as it takes itself. Where messages
usually take longer the CPU is left to whoever can use it.
"""

import numpy as np

from dllama.kernels.clock import nanoseconds, sched_yield
from dllama.kernels.jit import jit
from dllama.kernels.libzmq import NOBLOCK, message

WAIT = [(name, np.int64) for name in ("socket", "frames", "clock", "spin_ns", "usual_ns", "patience_ns", "blocks")]
"""Fields of a record: where messages come from, and room for the frames of one; which clock; how long to ask again and
again for a message of the only one that may send it, and how long these usually take; for how long to ask where several
may; whether the thread may sleep in the system instead, as long as the socket's RCVTIMEO."""


@jit
def heard(api, states, start, alone):
    """A message of any kind in the frames, if one comes in time: how many frames, 0 where none does. ``start``: when
    the waiting has begun;  ``alone``: whether only one may send it"""
    state = states[0]
    spins = not alone or state.usual_ns < state.spin_ns
    limit = state.spin_ns if alone else state.patience_ns
    waits = alone and state.blocks and not spins
    while True:
        count = message(api, state.socket, state.frames, 0 if waits else NOBLOCK)
        spent = nanoseconds(state.clock) - start
        if count or waits:
            break
        if spins and spent < limit:
            sched_yield()
        elif alone and state.blocks:
            waits = True
        else:
            break
    if alone:
        usual = min(spent, 2 * state.spin_ns) if count else 2 * state.spin_ns
        states[0].usual_ns += (usual - state.usual_ns) // 16
    return count
