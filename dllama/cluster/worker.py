"""A worker: waits for a root, takes its slice of a model, and runs steps until the root leaves."""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from dllama import __version__
from dllama.cluster import wire
from dllama.cluster.desk import Desk, RootGone, Superseded
from dllama.cluster.digest import model_digest, slice_label, slice_name
from dllama.cluster.job import Job
from dllama.cluster.join import Joining
from dllama.cluster.key import ClusterKey
from dllama.cluster.links import LinkLost
from dllama.cluster.listener import Listener
from dllama.cluster.loading import Loading
from dllama.cluster.member import Member
from dllama.cluster.mesh import Mesh, NodeLost
from dllama.cluster.slice_cache import SliceCache
from dllama.cluster.slices import ModelSlice, StoredSlice
from dllama.cluster.transfer import CHUNK_BYTES
from dllama.engine.candidates import pack
from dllama.engine.forward import Forward
from dllama.engine.memory import available_bytes, in_units
from dllama.engine.speed import read_speed
from dllama.engine.weights import Source
from dllama.errors import DllamaError
from dllama.formats import ModelFile
from dllama.kernels import jit
from dllama.kernels.team import Team

LOOK_MS = 50
"""How often a worker that loads looks for messages, and whether it is done."""
TELL_SECONDS = 0.5
"""How often it tells the root that it is still at it."""


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


class Unable(Exception):
    """Why the worker cannot do what the root asks."""


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
        self._settings, self._notify, self._progress = settings, notify, progress
        self._model = None if settings.model is None else ModelFile(settings.model)
        self._digest = self._model and model_digest(self._model, partial(progress, "reading the model"))
        self._cache = settings.cache or SliceCache(notify=notify)
        self._listener = Listener(settings.host, settings.port, settings.key, log=notify)
        self._team = Team(settings.nthreads)
        self._speed = read_speed(self._team)
        self._desk = Desk(self._listener, self._welcome, notify)
        self._job: Job | None = None
        self._joining: Joining | None = None
        self._member: Member | None = None
        self._thread: threading.Thread | None = None  # loads; may go on for a while after nobody wants it any more

    @property
    def port(self) -> int:
        return self._listener.port

    def serve(self) -> None:
        """Does not return."""
        while True:
            self._desk.wait_for_root()
            try:
                wish = None
                while True:
                    wish = self._serve(wish)
            except RootGone as gone:
                self._notify(str(gone))
            self._drop()
            self._desk.leave_root()

    def _serve(self, wish: tuple | None) -> tuple | None:
        """Does what the root asks, or asks next; returns what it wants instead, where it changes its mind meanwhile."""
        try:
            message, payload = wish or self._next()
            if type(message) is wire.Plan:
                self._prepare(message)
            elif type(message) is wire.Step and self._member is not None and message.epoch == self._job.epoch:
                self._step(message, payload)
            return None
        except Superseded as by:
            return by.message, by.payload
        except NodeLost as lost:
            if lost.node == 0:
                raise RootGone(f"the root is lost: {lost.reason}") from None
            self._notify(f"worker {self._job.addresses[lost.node]} is lost: {lost.reason}")
            failure = wire.Lost(self._job.epoch, lost.node, wire.line(lost.reason))
        except Unable as reason:
            self._notify(f"refused: {reason}")
            failure = wire.Refuse(wire.line(str(reason)))
        self._drop()  # only now that no frame of what failed holds the weights any more
        self._desk.tell(failure)
        return None

    def _prepare(self, message: wire.Plan) -> None:
        """Gets ready for a plan: the links to the other workers, the slice, the weights in memory."""
        self._drop()
        try:
            job = self._job = Job.of(message)
        except DllamaError as error:
            raise Unable(f"the plan makes no sense: {error}") from None
        self._check_memory(job)
        self._joining = Joining(self._desk, job, self._settings.key)
        endpoints = self._joining.endpoints()
        mesh = Mesh(self._desk.hub, endpoints, job.epoch, job.step_timeout, self._desk.other)
        source = self._slice(job)
        start = time.perf_counter()
        self._member = Member(job, self._load(job, source), mesh)
        self._notify(f"ready: {job.describe()}")
        self._desk.tell(wire.Ready(job.epoch, (time.perf_counter() - start) * 1e3))

    def _check_memory(self, job: Job) -> None:
        needed, free = job.share.memory_bytes(job.context, job.kv_type), self._free_memory()
        if free is not None and needed > free:
            raise Unable(
                f"not enough memory: its share needs {in_units(needed)} ({needed} bytes), "
                f"{in_units(free)} are free ({free} bytes)"
            )

    def _free_memory(self) -> int | None:
        known = [size for size in (available_bytes(), self._settings.memory) if size is not None]
        return min(known, default=None)

    def _slice(self, job: Job) -> Source:
        """The weights: from this worker's own model, from its cache, or from the root."""
        if self._model is not None:
            if self._digest == job.model_digest:
                self._desk.tell(wire.Need(job.epoch, True))
                return ModelSlice(self._model, job.share)
            self._notify(f"{self._model.path} is not the root's model, so the slice comes from the root")
        name, nbytes = slice_name(job.model_digest, job.share), job.layout.nbytes
        data = self._cache.find(name, nbytes)
        if data is not None:
            self._desk.tell(wire.Need(job.epoch, True))
            return StoredSlice(job.layout, data)
        try:
            return StoredSlice(job.layout, self._received(job, name, nbytes))
        except DllamaError as error:
            raise Unable(f"the slice cannot be received: {error}") from None

    def _received(self, job: Job, name: str, nbytes: int) -> np.ndarray:
        """The slice from the root, uint8 [nbytes]."""
        tell = _Throttle(self._desk.tell)
        label = slice_label(job.model_name, job.share)

        def verified(done: int, total: int) -> None:
            self._progress("checking what is there", done, total)
            tell(wire.Loading(job.epoch, done, total))

        with self._cache.receive(name, nbytes, CHUNK_BYTES, label, verified) as incoming:
            self._desk.tell(wire.Need(job.epoch, False), b"".join(digest or bytes(16) for digest in incoming.held))
            while incoming.done_bytes < nbytes:
                message, payload = self._next()
                if type(message) is not wire.Chunk or message.epoch != job.epoch:
                    raise Superseded(message, payload)
                incoming.write(message.index, payload[0], message.digest)
                self._desk.tell(wire.Got(job.epoch, message.index))
                self._progress("receiving weights", incoming.done_bytes, nbytes)
            return incoming.finish()

    def _load(self, job: Job, source: Source) -> Forward:
        """The weights made ready. The root is told how far it is, and may change its mind."""
        figures = 0, 1

        def note(*now: int) -> None:
            nonlocal figures
            figures = now

        if self._thread is not None:  # of an earlier plan; it has the team until it ends
            self._watch(job, lambda: figures)
        loading = Loading(job, source, self._team, self._notify, note)
        self._thread = loading.thread
        try:
            self._watch(job, lambda: figures)
            return loading.result()
        except (MemoryError, DllamaError) as error:
            raise Unable(f"the slice cannot be loaded: {error}") from None
        finally:
            loading.give_up()

    def _watch(self, job: Job, figures: Callable[[], tuple[int, int]]) -> None:
        """Returns at the end of a loading. Raises Superseded, RootGone."""
        tell = _Throttle(self._desk.tell)
        while self._thread.is_alive():
            try:
                received = self._desk.receive(LOOK_MS)
            except LinkLost:
                continue  # another worker's; the first step will notice
            if received and received[0] is self._desk.root:
                raise Superseded(received[1], received[2][1:])
            self._progress("loading weights", *figures())
            tell(wire.Loading(job.epoch, *figures()))
        self._progress("loading weights", *figures())

    def _step(self, message: wire.Step, payload) -> None:
        try:
            candidates, cost = self._member.step(message, payload[0] if payload else b"")
        except (ValueError, MemoryError, DllamaError) as error:
            if isinstance(error, NodeLost):
                raise
            raise Unable(f"the step cannot be run: {error}") from None
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

    def _next(self) -> tuple:
        """What the root says next: message and payload. Raises RootGone."""
        while True:
            try:
                received = self._desk.receive(None)
            except LinkLost:
                continue  # another worker's; the next step will notice
            if received is None:
                continue
            source, message, frames = received
            if source is self._desk.root:
                return message, frames[1:]
            self._keep(source, message, frames)

    def _keep(self, source, message, frames) -> None:
        """A part from a node that was told of the step before this one."""
        node = self._member and self._member.mesh.number(source)
        if node is not None and type(message) is wire.Part and message.epoch == self._job.epoch:
            self._member.mesh.keep(node, message, frames)

    def _welcome(self) -> wire.Welcome:
        return wire.Welcome(
            wire.PROTOCOL,
            __version__,
            wire.line(platform.node())[:255],
            self._settings.nthreads,
            self._free_memory(),
            self._speed,
            jit.ISA.name,
            self._digest,
        )

    def _drop(self) -> None:
        """Frees the slice and the links of a plan."""
        if self._joining is not None:
            self._joining.close()
        self._job = self._joining = self._member = None


class _Throttle:
    """Calls a function, but no more often than every TELL_SECONDS."""

    def __init__(self, function: Callable[..., None]):
        self._function, self._due = function, 0.0

    def __call__(self, *args) -> None:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + TELL_SECONDS
            self._function(*args)
