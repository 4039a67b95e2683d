"""A worker: waits for a root, takes its slice of a model, and runs steps until the root leaves."""

from __future__ import annotations

import os
import platform
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from dllama import __version__
from dllama.cluster import wire
from dllama.cluster.desk import Desk, RootGone, Superseded
from dllama.cluster.digest import model_digest
from dllama.cluster.hub import Hub
from dllama.cluster.job import Job
from dllama.cluster.join import Joining
from dllama.cluster.key import ClusterKey
from dllama.cluster.listener import Listener
from dllama.cluster.member import Member
from dllama.cluster.mesh import NodeLost
from dllama.cluster.preparation import Preparation, Unable
from dllama.cluster.slice_cache import SliceCache
from dllama.cluster.stack import StackMember
from dllama.engine.candidates import pack
from dllama.engine.speed import read_speed
from dllama.errors import DllamaError
from dllama.formats import ModelFile
from dllama.kernels import jit
from dllama.kernels.team import Team

LOOK_MS = 20
"""How often a worker that makes adapters for a stack looks whether they are ready, and tells that it is still there."""
IDLE_SECONDS = 10.0
"""When no root has come for so long a worker measures itself again: the first time it did so while it started, and
perhaps the machine with it. No root shall have to wait for that."""
MEASUREMENTS = 3
"""Of the last ones the best counts: what else a machine does only makes it slower."""
WORK = (wire.Step, wire.Pass, wire.Adapt)


@dataclass(frozen=True)
class WorkerSettings:
    """How a worker runs. key: None for links in the clear; memory: bytes that it may use, None for what is free; model:
    its own copy of a model, None where slices come from the root."""

    host: str
    port: int
    key: ClusterKey | None
    nthreads: int
    memory: int | None = None
    model: str | os.PathLike | None = None
    cache: SliceCache | None = None
    measured: bool = True


class Worker:
    """Serves one root at a time, and any number after one another.

    notify: called with a line for what happens; progress: called with a task's name, the bytes done and in all. Raises
    ClusterError for a port or host that cannot be used, FileError or FormatError for a model that cannot.
    """

    def __init__(
        self,
        settings: WorkerSettings,
        notify: Callable[[str], None],
        progress: Callable[[str, int, int], None] = lambda task, done, total: None,
    ):
        self._settings, self._notify = settings, notify
        model = None if settings.model is None else ModelFile(settings.model)
        self._digest = model and model_digest(model, partial(progress, "reading the model"))
        self._listener = Listener(settings.host, settings.port, settings.key, log=notify)
        self._team = Team(settings.nthreads)
        self._speeds: deque[float] = deque(maxlen=MEASUREMENTS)
        self._desk = Desk(self._listener, self._welcome, notify)
        cache = settings.cache or SliceCache(notify=notify)
        self._preparation = Preparation(
            self._desk, self._team, settings.memory, model, self._digest, cache, notify, progress
        )
        self._job: Job | None = None
        self._joining: Joining | None = None
        self._member: Member | StackMember | None = None
        self._measure()

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def hub(self) -> Hub:
        """What it listens to while it serves; others may add sources of theirs."""
        return self._desk.hub

    def serve(self) -> None:
        """Does not return."""
        while True:
            self._desk.wait_for_root(IDLE_SECONDS, self._measure)
            try:
                wish = None
                while True:
                    wish = self._serve(wish)
            except RootGone as gone:
                self._notify(str(gone))
            self._drop()
            self._desk.leave_root()

    def _measure(self) -> None:
        """Not while what a root that has left asked for still has the team."""
        if self._settings.measured and not self._preparation.is_loading:
            self._speeds.append(read_speed(self._team))

    def _serve(self, wish: tuple | None) -> tuple | None:
        """Does what the root asks, or asks next; returns what it wants instead, where it changes its mind meanwhile."""
        try:
            message, payload = wish or self._desk.next(self._keep, self._look)
            if type(message) is wire.Plan:
                self._prepare(message)
            elif type(message) is wire.Measure:
                self._preparation.finish_loading(message.epoch)
                self._desk.tell(wire.Measured(*message, read_speed(self._team)))
            elif type(message) in WORK and self._member is not None and message.epoch == self._job.epoch:
                self._work(message, payload[0] if payload else b"")
            return None
        except Superseded as by:
            return by.message, by.payload
        except NodeLost as lost:
            if lost.node == 0:
                raise RootGone(f"the root is lost: {lost.reason}") from None
            self._notify(f"worker {self._job.addresses[lost.node]} is lost: {lost.reason}")
            failure = wire.Lost(self._job.epoch, lost.node, wire.line(lost.reason))
        except (Unable, MemoryError) as error:
            reason = wire.line(str(error) or "not enough memory")
            self._notify(f"refused: {reason}")
            failure = wire.Refuse(reason)
        self._drop()  # only now that no frame of what failed holds the weights any more
        self._desk.tell(failure)
        return None

    def _prepare(self, message: wire.Plan) -> None:
        self._drop()
        try:
            self._job = Job.of(message)
        except DllamaError as error:
            raise Unable(f"the plan makes no sense: {error}") from None
        self._joining = Joining(self._desk, self._job, self._settings.key)
        self._member = self._preparation.member(self._job, self._joining)

    def _work(self, message, payload) -> None:
        try:
            if type(message) is wire.Step and not self._job.stack:
                self._step(message, payload)
            elif type(message) is wire.Pass and self._job.stack:
                self._member.run(message, payload)
            elif type(message) is wire.Adapt and self._job.stack:
                self._member.adapt(message)
        except NodeLost:
            raise
        except (ValueError, DllamaError) as error:
            raise Unable(f"the step cannot be run: {error}") from None

    def _step(self, message: wire.Step, payload) -> None:
        candidates, cost = self._member.step(message, payload)
        packed = [pack(found) for found in candidates]
        answer = wire.Candidates(
            message.epoch,
            message.step,
            [len(data) for data in packed],
            int(cost.inference_ms * 1e3),
            int(cost.transfer_ms * 1e3),
            cost.sent_bytes,
            cost.received_bytes,
        )
        self._desk.tell(answer, *([b"".join(packed)] if any(packed) else []))

    def _keep(self, source, message, frames) -> None:
        """A part from a node that was told of the step before this one."""
        mesh = self._member and self._member.mesh
        if mesh and type(message) is wire.Part and mesh.number(source) is not None:
            mesh.hear((source, frames))

    def _look(self) -> float | None:
        """Tells the root what has become of adapters for a stack; when to look again, in milliseconds."""
        if self._member is None or not self._job.stack or not self._member.is_loading:
            return None
        for adapted in self._member.adapted():
            self._desk.tell(adapted)
        self._desk.tell(wire.Beat())
        return LOOK_MS

    def _welcome(self) -> wire.Welcome:
        return wire.Welcome(
            wire.PROTOCOL,
            __version__,
            wire.line(platform.node())[:255],
            self._settings.nthreads,
            self._preparation.free_memory(),
            max(self._speeds, default=None),
            jit.ISA.name,
            self._digest,
        )

    def _drop(self) -> None:
        """Frees the slice and the links of a plan."""
        if self._joining is not None:
            self._joining.close()
        if isinstance(self._member, StackMember):
            self._member.close()
        self._job = self._joining = self._member = None
