"""A worker gets ready for a plan: its links to the other workers, its slice, the weights in memory."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dllama.cluster import wire
from dllama.cluster.desk import Desk, Superseded
from dllama.cluster.digest import slice_label, slice_name, unchanged
from dllama.cluster.job import Job
from dllama.cluster.join import Joining
from dllama.cluster.links import LinkLost
from dllama.cluster.loading import Loading, Made
from dllama.cluster.member import Member
from dllama.cluster.mesh import Mesh
from dllama.cluster.slice_cache import SliceCache
from dllama.cluster.slices import ModelSlice, StoredSlice
from dllama.cluster.stack import StackMember
from dllama.cluster.transfer import CHUNK_BYTES, chunk_digest
from dllama.engine.memory import available_bytes, in_units
from dllama.engine.weights import Source
from dllama.errors import DllamaError
from dllama.formats import ModelFile
from dllama.kernels.team import Team

LOOK_MS = 50
"""How often a worker that loads looks for messages, and whether it is done."""
TELL_SECONDS = 0.5
"""How often it tells the root that it is still at it."""


class Unable(Exception):
    """Why the worker cannot do what the root asks."""


class Preparation:
    """What a worker has for it: memory, its own copy of a model, a cache of slices, a team of threads.

    memory: bytes that it may use, None for what is free;  model: the copy, and its digest, None where there is
    none;  notify, progress: as in `Worker`
    """

    def __init__(
        self,
        desk: Desk,
        team: Team,
        memory: int | None,
        model: ModelFile | None,
        digest: bytes | None,
        cache: SliceCache,
        notify: Callable[[str], None],
        progress: Callable[[str, int, int], None],
    ):
        self._desk, self._team, self._limit, self._cache = desk, team, memory, cache
        self._model, self._digest = model, digest
        self._notify, self._progress = notify, progress
        self._thread: threading.Thread | None = None  # loads; may go on for a while after nobody wants it any more

    def member(self, job: Job, joining: Joining) -> Member | StackMember:
        """Ready to run the job's steps, or a stack's passes, as the root is told. Raises Unable, NodeLost, Superseded,
        RootGone."""
        mesh = Mesh(self._desk.hub, joining.endpoints(), job.epoch, job.step_timeout, self._desk.other)
        self.finish_loading(job.epoch)
        self._check_memory(job)
        source = self._slice(job)
        start = time.perf_counter()
        made = self._load(job, source)
        if job.adapters:
            self._desk.tell(wire.NeedAdapters(job.epoch))
            made.adapters.fill(self._adapters(job, made.adapters.nbytes))
        member = StackMember(job, made, mesh) if job.stack else Member(job, made, mesh)
        self._notify(f"ready: {job.describe()}")
        self._desk.tell(wire.Ready(job.epoch, (time.perf_counter() - start) * 1e3))
        return member

    @property
    def is_loading(self) -> bool:
        """Whether a thread has the team, and memory; it may be of an earlier plan."""
        return self._thread is not None and self._thread.is_alive()

    def finish_loading(self, epoch: int) -> None:
        """Waits until no thread does. Raises Superseded, RootGone."""
        if self.is_loading:
            self._watch(epoch, "loading weights", lambda: (0, 1), lambda: not self.is_loading)

    def _check_memory(self, job: Job) -> None:
        needed, free = job.memory_bytes, self.free_memory()
        if free is not None and needed > free:
            raise Unable(
                f"not enough memory: its share needs {in_units(needed)} ({needed} bytes), "
                f"{in_units(free)} are free ({free} bytes)"
            )

    def free_memory(self) -> int | None:
        """Bytes that a slice may take now; None where the system does not say."""
        known = [size for size in (available_bytes(), self._limit) if size is not None]
        return min(known, default=None)

    def _slice(self, job: Job) -> Source:
        """The weights: from this worker's own model, from its cache, or from the root."""
        if self._model is not None:
            as_it_was = unchanged(self._model)
            if self._digest == job.model_digest and as_it_was:
                self._desk.tell(wire.Need(job.epoch, True))
                return ModelSlice(self._model, job.share)
            why = "is not the root's model" if as_it_was else "has changed on disk since the start"
            self._notify(f"{self._model.path} {why}, so the slice comes from the root")
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
                message, payload = self._desk.next()
                if type(message) is not wire.Chunk or message.epoch != job.epoch:
                    raise Superseded(message, payload)
                incoming.write(message.index, payload[0], message.digest)
                self._desk.tell(wire.Got(job.epoch, message.index))
                self._progress("receiving weights", incoming.done_bytes, nbytes)
            with ThreadPoolExecutor(1) as thread:  # the disk may take its time
                finished = thread.submit(incoming.finish)
                self._watch(job.epoch, "storing weights", lambda: (nbytes, nbytes), finished.done)
            return finished.result()

    def _adapters(self, job: Job, nbytes: int) -> Iterator[np.ndarray]:
        """Bytes of its slice of the adapters, in their order, from the root. Raises Unable, Superseded, RootGone."""
        done = 0
        while done < nbytes:
            message, payload = self._desk.next()
            if type(message) is not wire.Chunk or message.epoch != job.epoch:
                raise Superseded(message, payload)
            data = np.frombuffer(payload[0], np.uint8)
            if chunk_digest(data) != message.digest or len(data) > nbytes - done:
                raise Unable("a chunk of the adapters arrived damaged")
            yield data
            done += len(data)
            self._desk.tell(wire.Got(job.epoch, message.index))
            self._progress("receiving adapters", done, nbytes)

    def _load(self, job: Job, source: Source) -> Made:
        """The weights made ready. The root is told how far it is, and may change its mind."""
        figures = 0, 1

        def note(*now: int) -> None:
            nonlocal figures
            figures = now

        loading = Loading(job, source, self._team, self._notify, note)
        self._thread = loading.thread
        try:
            self._watch(job.epoch, "loading weights", lambda: figures, lambda: not self.is_loading)
            return loading.result()
        except DllamaError as error:
            raise Unable(f"the slice cannot be loaded: {error}") from None
        finally:
            loading.give_up()

    def _watch(
        self, epoch: int, task: str, figures: Callable[[], tuple[int, int]], is_done: Callable[[], bool]
    ) -> None:
        """Returns at the end of what another thread does. Raises Superseded, RootGone."""
        tell = _Throttle(self._desk.tell)
        while not is_done():
            try:
                received = self._desk.receive(LOOK_MS)
            except LinkLost:
                continue  # another worker's; the first step will notice
            if received and received[0] is self._desk.root:
                raise Superseded(received[1], received[2][1:])
            self._progress(task, *figures())
            tell(wire.Loading(epoch, *figures()))
        self._progress(task, *figures())


class _Throttle:
    """Calls a function, but no more often than every TELL_SECONDS."""

    def __init__(self, function: Callable[..., None]):
        self._function, self._due = function, 0.0

    def __call__(self, *args) -> None:
        if time.monotonic() >= self._due:
            self._due = time.monotonic() + TELL_SECONDS
            self._function(*args)
