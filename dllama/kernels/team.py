"""A team of threads that work one compiled function together.

The helpers live as long as the team and sleep between steps; within a step all threads stay in compiled code,
share work by taking **tickets** (numbers from an atomic counter) and meet at spin barriers. Every stage hands out
``items`` tickets and each thread leaves it with one ticket too many, so the counter never needs a reset within a step:
the next stage's tickets start at ``items + threads`` more.

A step that has to leave compiled code in between is **led**: the helpers stay in it, at a gate before each part of the
work, and only the leading thread goes in and out.
"""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numba import types

from dllama.kernels.emit import I64, emitted
from dllama.kernels.jit import ISA, jit

ARRIVED, GENERATION, TICKET, STOP = 0, 64, 128, 192
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


@emitted()
def _store(e, address, value):
    e.store_atomic(value, e.inttoptr(address, I64.as_pointer()), "release", 8)


@jit
def gate(thread, sync, threads):
    """Lets the team into the next part of a led step, its tickets from 0 on; true where the step ends here instead."""
    if thread == 0:
        _store(sync + TICKET, 0)
    meet(sync, threads)
    return _load(sync + STOP) != 0


@contextmanager
def sigint_held() -> Iterator[None]:
    """Ctrl-C in the block, where it would leave a helper waiting at a barrier for ever, comes at its end. It is raised
    in place of what the block raises, since whoever catches that would go on.
    """
    before, held = signal.getsignal(signal.SIGINT), []
    if not callable(before) or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, lambda *event: held.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
        if held:
            before(*held[0])


class Team:
    """``nthreads`` threads, the caller's own among them. ``sync`` is the address of their shared counters."""

    def __init__(self, nthreads: int):
        self.nthreads = nthreads
        self._counters = np.zeros(64, np.int64)  # one cache line more than needed, for the alignment
        self.sync = -(-self._counters.ctypes.data // 64) * 64
        self._ticket, self._stop = self._counter(TICKET), self._counter(STOP)
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
        self._check_open()
        with sigint_held():
            self._release(function, args)
            try:
                function(0, *args)
            except BaseException as error:
                self._error = error
            self._join()

    @contextmanager
    def led(self, function, *args) -> Iterator[None]:
        """A led step: ``function(thread, *args)`` on the helpers, which wait at its first ``gate``.

        In the block the caller runs the function itself, as thread 0 and as often as it likes, each time up to the next
        gate. The end of the block, an exception's too, stops the helpers at the gate where they wait.
        """
        self._check_open()
        entered = False
        try:
            with sigint_held():
                self._release(function, args)
                entered = True
            yield
        finally:
            if entered and self._start:
                with sigint_held():
                    self._stop[0] = 1
                    gate(0, self.sync, self.nthreads)
                    self._join()

    def _check_open(self) -> None:
        if len(self._start) < self.nthreads - 1:
            raise RuntimeError("this team of threads is closed")

    def _release(self, function, args) -> None:
        self._ticket[0] = self._stop[0] = 0
        self._job, self._error = (function, args), None
        for start in self._start:
            start.release()

    def _join(self) -> None:
        for _ in self._start:
            self._done.acquire()
        if self._error is not None:
            raise self._error

    def _counter(self, offset: int) -> np.ndarray:
        return self._counters[(self.sync - self._counters.ctypes.data + offset) // 8 :][:1]

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


def in_threads(count: int) -> str:
    """In words: "4 threads"."""
    return f"{count} thread{'' if count == 1 else 's'}"


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
