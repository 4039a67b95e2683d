"""The cloud of PrivateLoRA: a worker that runs the decoder stack for several edges at once."""

from __future__ import annotations

import os
import platform
import time
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
from dllama.privatelora.adapter import CloudAdapter, read_cloud
from dllama.privatelora.backends import Backend, Restarted
from dllama.privatelora.schedule import Costs, choose
from dllama.privatelora.session import Session, Unfit, adapter_of
from dllama.privatelora.settings import BUSY

MOST_MESSAGES = 256
"""That are taken in before something is run again, however fast they come."""
LOOK_MS = 50
"""How often a cloud that makes adapters ready looks whether they are."""
IDLE_SECONDS = 1.0
"""And one with nothing to do, whether its edges are still there."""
BEAT_SECONDS = 1.0
"""How often it tells an edge that waits for that, that it is still at it."""


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
    told: float


class Cloud:
    """Serves edges, each with its own session, caches and adapter; those at the same place run as one batch.

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
        self._digest = model_digest(self._model, partial(progress, "reading the model"))
        self._backend = backend(self._model, partial(progress, "loading weights"))
        self.hub = Hub(self._listener)
        self._greeted: dict[Peer, float] = {}  # and when
        self._openings: dict[Peer, _Opening] = {}
        self._sessions: dict[Peer, Session] = {}
        self._adapters: dict[tuple[str, range], list] = {}  # the backend's number, and how many sessions use it
        self._costs = Costs()
        self._loader = ThreadPoolExecutor(1, "dllama-adapters")

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
            self._run(group)
            wait = 0.0
        looking = LOOK_MS / 1000 if self._openings else IDLE_SECONDS if self._greeted else None
        limits = [wait, timeout, looking, self._patience()]
        received = self._receive(min((limit for limit in limits if limit is not None), default=None))
        for _ in range(MOST_MESSAGES):
            if not received:
                break
            self._take(*received)
            received = self._receive(0)
        self._look()

    def close(self) -> None:
        """Lets go of everything."""
        self._loader.shutdown()
        self._listener.close()
        self._model.close()

    # --- what comes in ---

    def _receive(self, timeout: float | None) -> tuple[Peer, list] | None:
        awaited = timeout != 0 and any(s.passage is not None for s in self._sessions.values())
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
            self._check_memory(session, message)
            session.enter(message, payload)
        elif type(message) is wire.Hello:
            self._greet(peer, message)
        elif type(message) is wire.Open and peer in self._greeted and session is None and peer not in self._openings:
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
        name, free = wire.line(platform.node())[:255], available_bytes()
        threads = self._settings.nthreads
        welcome = wire.Welcome(wire.PROTOCOL, __version__, name, threads, free, None, jit.ISA.name, self._digest)
        _send(peer, wire.encode(welcome))

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
        number = self._loader.submit(self._number, adapter, layers)
        self._openings[peer] = _Opening(wanted, adapter, number, time.monotonic())

    def _number(self, adapter: CloudAdapter | None, layers: range) -> int:
        """The backend's number for an adapter, which several sessions may share. Runs in the loader's thread."""
        self._backend.prepare()
        if adapter is None:
            return NO_ADAPTER
        entry = self._adapters.get((adapter.fingerprint, layers))
        if entry is None:
            try:
                entry = self._adapters[adapter.fingerprint, layers] = [self._backend.add(adapter, layers), 0]
            except LookupError as error:
                raise Unfit(str(error)) from None
        entry[1] += 1
        return entry[0]

    def _drop(self, number: int) -> None:
        """One session less uses an adapter. Runs in the loader's thread."""
        for key, entry in list(self._adapters.items()):
            if entry[0] == number:
                entry[1] -= 1
                if not entry[1]:
                    del self._adapters[key]
                    self._backend.remove(number)

    def _check_memory(self, session: Session, message: wire.Enter) -> None:
        new = session.new_sequences(message)
        if not new:
            return
        needed, free = new * self._backend.sequence_bytes(session.context), self._backend.free_bytes()
        if free is not None and needed > free:
            raise Unfit(f"not enough memory in the cloud: {in_units(needed)} needed for keys and values, "
                        f"{in_units(free)} are free")  # fmt: skip

    # --- what goes out ---

    def _run(self, group: Sequence[Session]) -> None:
        """One pass, up to the next stop or to the end."""
        peers = {session: peer for peer, session in self._sessions.items()}

        unfit: list[tuple[Peer, str]] = []

        def tell(session: Session, message: Callable[[], list]) -> None:
            try:
                _send(peers[session], message())
            except Unfit as error:
                unfit.append((peers[session], str(error)))

        def send(lows: Sequence) -> None:
            for session, low in zip(group, lows, strict=True):
                tell(session, partial(session.stopped, low))

        came_from, to = group[0].came_from, group[0].goes_to
        passages = [session.passage for session in group]
        streams, start = None, time.perf_counter()
        try:
            if isinstance(to, int):
                streams = self._backend.finish(passages, came_from, to)
            else:
                self._backend.run(passages, came_from, to, send)
        except Restarted as error:
            self._begin_anew(error)
            return
        except (DllamaError, MemoryError) as error:
            for session in group:
                self._refuse(peers[session], str(error) or "not enough memory")
            return
        seconds = time.perf_counter() - start
        self._costs.passed(seconds)
        for i, session in enumerate(group):
            session.seconds += seconds
            if streams is not None:
                self._costs.stepped(session.seconds)
                tell(session, partial(session.left, streams[i]))
        for peer, reason in unfit:
            self._refuse(peer, reason)

    def _patience(self) -> float | None:
        """Seconds until an edge has owed an answer for too long."""
        since = [s.waits_since for s in self._sessions.values() if s.passage is not None and s.ready_at is None]
        return max(0.0, min(since) + self._settings.step_timeout - time.monotonic()) if since else None

    def _look(self) -> None:
        """What time brings: adapters that are ready, edges that have not answered."""
        now = time.monotonic()
        for peer, opening in list(self._openings.items()):
            if opening.number.done():
                del self._openings[peer]
                try:
                    number = opening.number.result()
                except Restarted as error:
                    self._begin_anew(error)
                    layers = range(*opening.session["layers"])
                    opening.number = self._loader.submit(self._number, opening.adapter, layers)
                    self._openings[peer] = opening
                    return
                except (DllamaError, MemoryError) as error:
                    self._refuse(peer, str(error) or "not enough memory")
                    continue
                self._sessions[peer] = Session(opening.session, opening.adapter, number, self._backend)
                _send(peer, wire.encode(wire.Opened(self._backend.device)))
            elif now > opening.told + BEAT_SECONDS:
                opening.told = now
                _send(peer, wire.encode(wire.Beat()))
        for peer, session in list(self._sessions.items()):
            late = session.passage is not None and session.ready_at is None
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
            self._loader.submit(self._drop, session.number)
        if opening is not None:
            opening.number.add_done_callback(self._dropped)

    def _dropped(self, number: Future) -> None:
        """An adapter is ready, and its edge gone. Runs in the loader's thread, or where that is done already."""
        if number.exception() is None and number.result() != NO_ADAPTER:
            self._loader.submit(self._drop, number.result())


def _send(peer: Peer, frames: Sequence) -> None:
    with suppress(LinkLost):  # the hub will tell
        peer.send(frames)
