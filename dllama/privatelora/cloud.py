"""The cloud of PrivateLoRA: a worker that runs the decoder stack for several edges at once."""

from __future__ import annotations

import os
import platform
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from dllama import __version__
from dllama.cluster import wire
from dllama.cluster.digest import model_digest, unchanged
from dllama.cluster.hub import Hub
from dllama.cluster.key import ClusterKey
from dllama.cluster.links import LinkLost
from dllama.cluster.listener import Listener, Peer
from dllama.cluster.settings import STEP_TIMEOUT
from dllama.engine.adapters import NO_ADAPTER
from dllama.engine.memory import available_bytes, in_units
from dllama.errors import DllamaError
from dllama.formats import ModelFile
from dllama.kernels import jit
from dllama.privatelora import travel
from dllama.privatelora.adapter import CloudAdapter, read_cloud
from dllama.privatelora.backends import Backend, Restarted
from dllama.privatelora.passes import aside, take_on
from dllama.privatelora.schedule import Costs, choose
from dllama.privatelora.session import OVERFLOW, Session, Unfit, adapter_of
from dllama.privatelora.settings import BUSY
from dllama.privatelora.shared_adapters import SharedAdapters
from dllama.privatelora.short_way import SHORT_ROWS, EdgeTalk, ShortWay

MOST_MESSAGES = 256
"""That are taken in before something is run again, however fast they come."""
LOOK_MS = 50
"""How often a cloud that loads its model, or makes adapters ready, looks whether it is done."""
IDLE_SECONDS = 1.0
"""And one with nothing to do, whether its edges are still there."""
BEAT_SECONDS = 1.0
"""How often it tells edges that wait for it that it is still at it."""
ALONE_SECONDS = 60.0
"""After an error in a pass that several edges shared, each of them has passes of its own for so long."""


@dataclass(frozen=True)
class CloudSettings:
    """How a cloud runs. key: None for links in the clear; model: the file; adapters: files with A and B for edges whose
    adapters come from no seed; max_edges: served at a time; step_timeout: seconds until an edge that owes an answer is
    given up."""

    host: str
    port: int
    key: ClusterKey | None
    nthreads: int
    model: str | os.PathLike
    adapters: Sequence[str] = ()
    max_edges: int = 8
    step_timeout: float = STEP_TIMEOUT


@dataclass
class _Opening:
    """An edge whose adapter is being made ready."""

    session: dict
    adapter: CloudAdapter | None
    number: Future


class Cloud:
    """Serves edges, each with its own session, caches and adapter; those at the same place run as one batch.

    It is made when the model is loaded; edges that come before are told to wait.

    ``backend(model)`` makes what computes;  ``notify``, ``progress``: as in `Worker`. Raises as `Worker`, and
    AdapterError for an adapter that is another model's.
    """

    def __init__(
        self,
        settings: CloudSettings,
        backend: Callable[[ModelFile, Callable[[int, int], None]], Backend],
        notify: Callable[[str], None],
        progress: Callable[[str, int, int], None] = lambda task, done, total: None,
    ):
        self._settings, self._notify = settings, notify
        self._model = ModelFile(settings.model)
        self._known = {}
        for path in settings.adapters:
            adapter = read_cloud(path)
            adapter.check(self._model.config)
            self._known[adapter.fingerprint] = adapter
        self._listener = Listener(settings.host, settings.port, settings.key, log=notify)
        self.hub = Hub(self._listener)
        self._greeted: dict[Peer, float] = {}  # and when
        self._openings: dict[Peer, _Opening] = {}
        self._sessions: dict[Peer, Session] = {}
        self._adapters: SharedAdapters | None = None
        self._talking: tuple[EdgeTalk, ...] = ()  # whose way it is
        self._way: ShortWay | None = None
        self._costs = Costs()
        self._loader = ThreadPoolExecutor(1, "dllama-loader")  # of the model, then of adapters
        self._worker = ThreadPoolExecutor(1, "dllama-pass")
        self._kept: deque[tuple[Peer, list] | LinkLost] = deque()  # what came of the edges in the middle of a pass
        self._beaten = self._alone_until = 0.0
        self._backend: Backend | None = None
        self._load(backend, progress)

    @property
    def port(self) -> int:
        return self._listener.port

    @property
    def device(self) -> str:
        """What computes, for people."""
        return self._backend.device

    def serve(self) -> None:
        """Does not return."""
        while True:
            self.turn(None)

    def turn(self, timeout: float | None) -> None:
        """Takes in what has come, and runs what can be run; waits at most so many seconds for something to do."""
        group, wait = choose(list(self._sessions.values()), self._costs, time.monotonic())
        if group:
            group = group[:1] if time.monotonic() < self._alone_until else group
            group = sorted(group, key=lambda session: session.number)  # the same edges, the same batch
            for session in group:
                session.goes_on()
            way = self._short_way(group)
            if way is not None:
                self._go(group, way)
            else:
                self._run(group)
            wait = 0.0
        looking = LOOK_MS / 1000 if self._openings else IDLE_SECONDS if self._greeted else None
        limits = [wait, timeout, looking, self._patience()]
        received = self._receive(min((limit for limit in limits if limit is not None), default=None))
        for _ in range(MOST_MESSAGES):
            if not received:
                break
            self._take(*received)
            received = self._receive(0) if self._more_may_come() else None
        self._look()

    def _more_may_come(self) -> bool:
        """Whether to ask for a message before the next pass: where every edge is ready for one, it can wait."""
        return not self._sessions or any(session.ready_at is None for session in self._sessions.values())

    def close(self) -> None:
        """Lets go of everything."""
        self._loader.shutdown()
        self._worker.shutdown()
        self._listener.close()
        self._model.close()

    def _load(self, backend: Callable[[ModelFile, Callable[[int, int], None]], Backend], progress: Callable) -> None:
        """Makes the backend in the loader's thread, and talks meanwhile. Raises whatever loading raises."""

        def load() -> tuple[bytes, Backend]:
            travel.prepare()
            digest = model_digest(self._model, partial(progress, "reading the model"))
            return digest, backend(self._model, partial(progress, "loading weights"))

        loading = self._loader.submit(load)
        try:
            while not loading.done():
                self.turn(LOOK_MS / 1000)
            self._digest, self._backend = loading.result()
            self._adapters = SharedAdapters(self._backend)
        except BaseException:
            self._listener.close()
            raise
        for peer in list(self._greeted):
            self._welcome(peer)

    # --- what comes in ---

    def _receive(self, timeout: float | None) -> tuple[Peer, list] | None:
        if self._kept:
            kept = self._kept.popleft()
            if not isinstance(kept, LinkLost):
                return kept
            self._forget(kept.source, kept.reason)
            return None
        awaited = timeout != 0 and any(s.passages for s in self._sessions.values())
        received = self.hub.receive_soon() if awaited else None
        if received:
            return received
        start = time.perf_counter()
        try:
            return self.hub.receive(None if timeout is None else timeout * 1000)
        except LinkLost as lost:
            if isinstance(lost.source, Peer):
                self._forget(lost.source, lost.reason)
            return None
        finally:
            if awaited:
                self.hub.waited(time.perf_counter() - start)

    def _take(self, peer: Peer, frames: list) -> None:
        try:
            message, payload = wire.decode(frames)
            self._hear(peer, message, payload)
        except (Unfit, wire.WireError) as error:
            self._refuse(peer, str(error))
        except (DllamaError, MemoryError) as error:
            self._refuse(peer, str(error) or "not enough memory")

    def _hear(self, peer: Peer, message, payload: Sequence) -> None:
        session = self._sessions.get(peer)
        if type(message) is wire.Answer and session is not None:
            session.answered(message, payload)
        elif type(message) is wire.Enter and session is not None:
            session.free(message.freed)
            self._check_memory(session, message)
            session.enter(message, payload)
        elif type(message) is wire.Hello:
            self._greet(peer, message)
        elif type(message) is wire.Open and self._may_open(peer):
            self._open(peer, message.session)
        elif type(message) is wire.Bye:
            self._forget(peer, "it has left")
            _send(peer, [*wire.encode(wire.Bye())])
        elif type(message) is wire.Probe:
            _send(peer, wire.encode(message))
        elif type(message) not in (wire.Beat, wire.Refuse):
            raise Unfit(f"{type(message).__name__}: nothing that this cloud waits for")

    def _greet(self, peer: Peer, message: wire.Hello) -> None:
        if message.version != __version__:
            raise Unfit(
                f"this worker runs dllama {__version__} and the edge {message.version}: install the same on both"
            )
        if message.role != "edge":
            raise Unfit("this worker serves edges (it was started with --device), and is no part of a cluster")
        if peer not in self._greeted and len(self._greeted) >= self._settings.max_edges:
            raise Unfit(f"{BUSY} with {len(self._greeted)} edges, as many as it takes; try again later")
        self._greeted[peer] = time.monotonic()
        self._notify(f"an edge has come, {peer.name}")
        if self._backend is not None:
            self._welcome(peer)

    def _welcome(self, peer: Peer) -> None:
        self._greeted[peer] = time.monotonic()
        name, free = wire.line(platform.node())[:255], available_bytes()
        threads = self._settings.nthreads
        welcome = wire.Welcome(wire.PROTOCOL, __version__, name, threads, free, None, jit.ISA.name, self._digest)
        _send(peer, wire.encode(welcome))

    def _may_open(self, peer: Peer) -> bool:
        has_none = peer not in self._sessions and peer not in self._openings
        return peer in self._greeted and has_none and self._backend is not None

    def _open(self, peer: Peer, wanted: dict) -> None:
        config = self._backend.config
        if wanted["model_digest"] != self._digest or not unchanged(self._model):
            raise Unfit(f"this cloud has another model, {Path(self._model.path).name}")
        layers = range(*wanted["layers"])
        if layers.stop > config.n_layers or not layers:
            raise Unfit(f"layers {layers.start} to {layers.stop} of a model of {config.n_layers}")
        if wanted["context"] > config.seq_len:
            raise Unfit(f"a context of {wanted['context']} tokens, and the model has {config.seq_len}")
        adapter = adapter_of(wanted["adapter"], config, self._known)
        number = self._loader.submit(self._adapters.take, adapter, layers)
        self._openings[peer] = _Opening(wanted, adapter, number)

    def _check_memory(self, session: Session, message: wire.Enter) -> None:
        new = session.new_sequences(message)
        if not new:
            return
        needed, free = new * self._backend.sequence_bytes(session.context), self._backend.free_bytes()
        if free is not None and needed > free:
            raise Unfit(f"not enough memory in the cloud: {in_units(needed)} needed for keys and values, "
                        f"{in_units(max(0, free))} are free; a shorter context (--max-seq-len) needs less")  # fmt: skip

    # --- what goes out ---

    def _run(self, group: Sequence[Session]) -> None:
        """One pass, up to the next stop or to the end."""
        unfit: list[tuple[Peer, str]] = []

        def tell(session: Session, message: Callable[[], list]) -> None:
            try:
                _send(session.peer, message())
            except Unfit as error:
                unfit.append((session.peer, str(error)))

        def send(lows: Sequence) -> None:
            for session, low in zip(group, lows, strict=True):
                tell(session, partial(session.stopped, low))

        came_from, to = group[0].came_from, group[0].goes_to
        passages = [passage for session in group for passage in session.passages]
        rows = sum(session.rows for session in group)
        work = partial(take_on, self._backend, passages, came_from, to)

        start = time.perf_counter()
        try:
            if rows > SHORT_ROWS or self._costs.pass_seconds > BEAT_SECONDS / 4:
                streams = aside(self._worker, work, send, self._talk, BEAT_SECONDS / 2)
            else:
                streams = work(send)
        except Restarted as error:
            self._begin_anew(error)
            return
        except (DllamaError, MemoryError) as error:
            self._give_up(group, error)
            return
        seconds = time.perf_counter() - start
        self._costs.passed(seconds)
        for i, session in enumerate(group):
            session.seconds += seconds
            if streams is not None:
                self._costs.ended(session)
                tell(session, partial(session.left, streams[i]))
        for peer, reason in unfit:
            self._refuse(peer, reason)

    def _short_way(self, group: Sequence[Session]) -> ShortWay | None:
        """What could take them on in one call: where nothing is to be done for other edges for a while."""
        recent = time.monotonic() - self._costs.step_seconds
        others = [other for other in self._sessions.values() if other not in group]
        if self._kept or self._openings or any(other.passages or other.left_at > recent for other in others):
            return None
        if sum(session.rows for session in group) > SHORT_ROWS or self._costs.pass_seconds > BEAT_SECONDS / 4:
            return None
        edges = tuple(session.talk() for session in group)
        if None in edges or any(edge.path != edges[0].path for edge in edges):
            return None
        if edges != self._talking:
            self._talking, self._way = edges, self._backend.short_way(edges)
        self._way.begin(group[0].passed, self._costs.pass_seconds)
        return self._way

    def _go(self, group: Sequence[Session], way: ShortWay) -> None:
        """Past some stops."""
        start, before = time.perf_counter(), way.passed
        try:
            self._backend.go([passage for s in group for passage in s.passages], group[0].came_from, way)
        except (DllamaError, MemoryError) as error:
            self._give_up(group, error)
            return
        seconds = time.perf_counter() - start - way.waited
        self._costs.passed(seconds / max(1, way.passed - before))
        for session, answered, unfit in zip(group, way.answered, way.unfit, strict=True):
            session.seconds += seconds
            session.went(way.passed, answered)
            if unfit:
                self._refuse(session.peer, OVERFLOW)
        frames = way.other
        received = frames and self._listener.understand(frames)
        if received:
            self._take(*received)

    def _give_up(self, group: Sequence[Session], error: Exception) -> None:
        """A pass has failed."""
        reason = str(error) or "not enough memory"
        if len(group) > 1:  # each may be fine by itself
            self._alone_until = time.monotonic() + ALONE_SECONDS
            reason = f"{BUSY}: a pass for {len(group)} edges has failed: {reason}"
        for session in group:
            self._refuse(session.peer, reason)

    def _talk(self) -> None:
        """In the middle of a pass."""
        self._listen()
        self._beat()

    def _listen(self) -> None:
        """Takes in what comes in the middle of a pass. Strangers are answered; what comes of edges that have a session,
        and may be part of the pass, is kept for its end."""
        while len(self._kept) < MOST_MESSAGES:
            try:
                received = self.hub.receive(0)
            except LinkLost as lost:
                if lost.source in self._sessions:
                    self._kept.append(lost)
                elif isinstance(lost.source, Peer):
                    self._forget(lost.source, lost.reason)
                continue
            if received is None:
                return
            if received[0] in self._sessions:
                self._kept.append(received)
            else:
                self._take(*received)

    def _beat(self) -> None:
        """Tells the edges that wait for this cloud that it is still at it, every BEAT_SECONDS."""
        now = time.monotonic()
        if now < self._beaten + BEAT_SECONDS:
            return
        self._beaten = now
        heard = {kept[0] for kept in self._kept if not isinstance(kept, LinkLost)}
        for peer in self._greeted:
            session = self._sessions.get(peer)
            if session is None or session.passages or peer in heard:  # others do not read
                _send(peer, wire.encode(wire.Beat()))

    def _patience(self) -> float | None:
        """Seconds until an edge has owed an answer for too long."""
        since = [s.waits_since for s in self._sessions.values() if s.passages and s.ready_at is None]
        return max(0.0, min(since) + self._settings.step_timeout - time.monotonic()) if since else None

    def _look(self) -> None:
        """What time brings: adapters that are ready, edges that have not answered."""
        self._beat()
        if self._backend is None:
            return
        now = time.monotonic()
        for peer, opening in list(self._openings.items()):
            if opening.number.done():
                del self._openings[peer]
                try:
                    number = opening.number.result()
                except Restarted as error:
                    self._begin_anew(error)
                    layers = range(*opening.session["layers"])
                    opening.number = self._loader.submit(self._adapters.take, opening.adapter, layers)
                    self._openings[peer] = opening
                    return
                except (DllamaError, MemoryError) as error:
                    self._refuse(peer, str(error) or "not enough memory")
                    continue
                self._sessions[peer] = Session(opening.session, opening.adapter, number, self._backend, peer)
                _send(peer, wire.encode(wire.Opened(self._backend.device)))
        for peer, session in list(self._sessions.items()):
            late = session.passages and session.ready_at is None
            if late and now > session.waits_since + self._settings.step_timeout:
                self._refuse(peer, f"no answer for {self._settings.step_timeout:g} s")
        for peer, since in list(self._greeted.items()):
            idle = peer not in self._sessions and peer not in self._openings
            if idle and now > since + self._settings.step_timeout:
                self._refuse(peer, "it asked for nothing")

    def _begin_anew(self, why: Restarted) -> None:
        """The backend has nothing of the edges any more: they come again, and run their texts again."""
        for peer in [*self._sessions, *self._openings]:
            self._refuse(peer, f"{BUSY}: {why}")

    def _refuse(self, peer: Peer, reason: str) -> None:
        """Tells an edge, or whoever it is, and forgets it."""
        _send(peer, wire.encode(wire.Refuse(wire.line(reason))))
        self._forget(peer, None)
        self._notify(f"refused {peer.name}: {reason}")

    def _forget(self, peer: Peer, why: str | None) -> None:
        """Frees all that an edge had."""
        if peer in self._greeted and why:
            self._notify(f"edge {peer.name}: {why}")
        self._greeted.pop(peer, None)
        session, opening = self._sessions.pop(peer, None), self._openings.pop(peer, None)
        if session is not None and session.number != NO_ADAPTER:
            self._loader.submit(self._adapters.give_back, session.number)
        if opening is not None:
            opening.number.add_done_callback(self._dropped)

    def _dropped(self, number: Future) -> None:
        """An adapter is ready, and its edge gone. Runs in the loader's thread, or where that is done already."""
        if number.exception() is None and number.result() != NO_ADAPTER:
            self._loader.submit(self._adapters.give_back, number.result())


def _send(peer: Peer, frames: Sequence) -> None:
    with suppress(LinkLost):  # the hub will tell
        peer.send(frames)
