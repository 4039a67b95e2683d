"""Time, for compiled code that waits."""

from numba import types

from dllama.kernels.emit import I8, I32, I64, const, emitted

sched_yield = types.ExternalFunction("sched_yield", types.int32())


@emitted(types.int64)
def nanoseconds(e, clock):
    """clock_gettime(3)"""
    now = e.scratch(16)
    e.call("clock_gettime", I32, e.trunc(clock, I32), e.inttoptr(now, I8.as_pointer()))
    return e.add(e.mul(e.load(I64, now), const(I64, 10**9)), e.load(I64, now, 8))
