"""A node's weights made ready in a thread of their own, so that the node can go on talking."""

from __future__ import annotations

import threading
from collections.abc import Callable

from dllama.cluster import direct
from dllama.cluster.job import Job
from dllama.engine.adapter_weights import AdapterWeights
from dllama.engine.compiling import compiling
from dllama.engine.forward import Forward
from dllama.engine.weights import Source
from dllama.kernels import tags
from dllama.kernels.team import Team
from dllama.privatelora.backends.cpu import CpuBackend

Made = Forward | CpuBackend


class GivenUp(Exception):
    """Nobody wants these weights any more."""


class Loading:
    """A job's `Forward`, or where it is for a stack its `CpuBackend`, in the making, until it is given up. Adapters of
    the job are still to be filled.

    notify: called with a line where it has to compile first; progress: called with the bytes done and in all, from the
    thread. The team is in use until the thread has ended.
    """

    def __init__(
        self,
        job: Job,
        source: Source,
        team: Team,
        notify: Callable[[str], None],
        progress: Callable[[int, int], None],
    ):
        self._progress = progress
        self._given_up = False
        self._made: Made | None = None
        self._error: BaseException | None = None
        args = job, source, team, notify
        self.thread = threading.Thread(target=self._run, args=args, name="dllama-load", daemon=True)
        self.thread.start()

    def give_up(self) -> None:
        """Ends it at the next tensor; what is being compiled is compiled to the end."""
        self._given_up = True

    def result(self) -> Made:
        """Waits for its end, and gives away what it made. Raises what loading raised."""
        self.thread.join()
        if self._error is not None:
            try:
                raise self._error
            finally:
                self._error = None
        made, self._made = self._made, None  # the weights know whom they told of their progress: no cycle
        return made

    def _run(self, job: Job, source: Source, team: Team, notify: Callable[[str], None]) -> None:
        act, cache = (tags.BY_NAME[kind.name.lower()] for kind in (job.buffer_type, job.kv_type))
        try:
            if job.stack:
                with compiling(job.share.config, job.buffer_type, job.kv_type, notify, "halves"):
                    direct.prepare(act, tags.F32)
                    self._made = CpuBackend(source, team, act, cache, self._tell, job.share.shape, job.share.slices)
                return
            adapters = AdapterWeights(job.ranks, source) if job.adapters else None
            exchanged = act if direct.serves(job.form) and len(job.shares) > 1 else None
            more = ["adapters"] * bool(job.adapters) + ["exchange"] * (exchanged is not None)
            with compiling(job.share.config, job.buffer_type, job.kv_type, notify, *more):
                direct.prepare(act)
                self._made = Forward(
                    source, team, act, cache, job.context, self._tell, job.share.shape, adapters, exchanged=exchanged
                )
        except GivenUp:
            pass
        except BaseException as error:  # it belongs to who waits for the result
            self._error = error

    def _tell(self, done: int, total: int) -> None:
        if self._given_up:
            raise GivenUp
        self._progress(done, total)
