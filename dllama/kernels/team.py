"""A team of threads that work one compiled function together.

The helpers live as long as the team and sleep between steps; within a step all threads stay in compiled code,
share work by taking **tickets** (numbers from an atomic counter) and meet at spin barriers. Every stage hands out
``items`` tickets and each thread leaves it with one ticket too many, so the counter never needs a reset within a step:
the next stage's tickets start at ``items + threads`` more.
"""

import signal
import threading

import numpy as np
from numba import types

from dllama.kernels.emit import I64, emitted
from dllama.kernels.jit import ISA, jit

ARRIVED, GENERATION, TICKET = 0, 64, 128
"""Byte offsets of the shared counters, each in a cache line of its own."""
SPINS = 4096
"""Turns of a barrier before a thread offers its CPU to others."""


@emitted(types.int64)
def _fetch_add(e, address, value):
    return e.atomic_rmw("add", e.inttoptr(address, I64.as_pointer()), value, "acq_rel")


@emitted(types.int64)
def _load(e, address):
    return e.load_atomic(e.inttoptr(address, I64.as_pointer()), "acquire", 8)


@emitted()
def _pause(e):
    ISA.pause(e)


_sched_yield = types.ExternalFunction("sched_yield", types.int32())


@jit(inline=True)
def take(sync, base):
    """The number of the next item of a stage whose tickets start at ``base``; past the last item there is no work."""
    return _fetch_add(sync + TICKET, 1) - base


@jit
def meet(sync, threads):
    """Returns when all threads of the team have called it."""
    if threads == 1:
        return
    generation = _load(sync + GENERATION)
    if _fetch_add(sync + ARRIVED, 1) == threads - 1:
        _fetch_add(sync + ARRIVED, -threads)
        _fetch_add(sync + GENERATION, 1)
        return
    spins = 0
    while _load(sync + GENERATION) == generation:
        _pause()
        spins += 1
        if spins > SPINS:
            _sched_yield()


class Team:
    """``nthreads`` threads, the caller's own among them. ``sync`` is the address of their shared counters."""

    def __init__(self, nthreads: int):
        self.nthreads = nthreads
        self._counters = np.zeros(64, np.int64)  # one cache line more than needed, for the alignment
        self.sync = -(-self._counters.ctypes.data // 64) * 64
        self._ticket = self._counters[(self.sync - self._counters.ctypes.data + TICKET) // 8 :][:1]
        self._start = [threading.Semaphore(0) for _ in range(nthreads - 1)]
        self._done = threading.Semaphore(0)
        self._job = self._error = None
        self._threads = [
            threading.Thread(target=self._help, args=(i,), name=f"dllama-{i + 1}", daemon=True)
            for i in range(nthreads - 1)
        ]
        for thread in self._threads:
            thread.start()

    def run(self, function, *args) -> None:
        """``function(thread, *args)`` on every thread at once; returns when all have.

        An error in any of them, and Ctrl-C, is raised when all are done, so that the next step starts afresh.
        RuntimeError where the team is closed.
        """
        if len(self._start) < self.nthreads - 1:
            raise RuntimeError("this team of threads is closed")
        before, held = signal.getsignal(signal.SIGINT), []
        if not callable(before) or threading.current_thread() is not threading.main_thread():
            return self._run(function, *args)
        # Ctrl-C between two helpers' starts would leave one of them waiting at a barrier for ever.
        signal.signal(signal.SIGINT, lambda *event: held.append(event))
        try:
            self._run(function, *args)
        finally:
            signal.signal(signal.SIGINT, before)
        if held:
            before(*held[0])

    def _run(self, function, *args) -> None:
        self._ticket[0] = 0
        self._job, self._error = (function, args), None
        for start in self._start:
            start.release()
        try:
            function(0, *args)
        except BaseException as error:
            self._error = error
        for _ in self._start:
            self._done.acquire()
        if self._error is not None:
            raise self._error

    def _help(self, index: int) -> None:
        while True:
            self._start[index].acquire()
            if self._job is None:
                return
            function, args = self._job
            try:
                function(index + 1, *args)
            except BaseException as error:
                self._error = error
            self._done.release()

    def close(self) -> None:
        """Ends the helpers. The team cannot run again."""
        self._job = None
        for start in self._start:
            start.release()
        for thread in self._threads:
            thread.join()
        self._start, self._threads = [], []
