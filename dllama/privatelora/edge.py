"""The edge of PrivateLoRA: an engine that keeps text, embedding, output matrix and M, and has a cloud for the rest."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from weakref import WeakSet

import numpy as np

from dllama import __version__
from dllama.cluster import wire
from dllama.cluster.digest import model_digest, require_unchanged
from dllama.cluster.hub import Hub
from dllama.cluster.links import Link, LinkLost
from dllama.engine.adapter_weights import AdapterWeights, ranks_of, values_of
from dllama.engine.adapters import NO_ADAPTER
from dllama.engine.candidates import Candidates, Reduction, reduce
from dllama.engine.compiling import compiling
from dllama.engine.forward import Forward
from dllama.engine.interface import NodeCost, Row
from dllama.engine.kv_cache import KVCache
from dllama.engine.workspace import Place
from dllama.errors import AdapterError, ClusterError, ModelError
from dllama.formats import FloatType, ModelFile
from dllama.kernels import libzmq, tags
from dllama.kernels.team import Team, sigint_held
from dllama.lora import LoraAdapter
from dllama.privatelora import replies
from dllama.privatelora.adapter import CLOUD_FILE, EDGE_FILE, CloudAdapter, EdgeAdapter, read_cloud, read_edge
from dllama.privatelora.answers import Answers
from dllama.privatelora.passage import Stop, most_rows, spans
from dllama.privatelora.replies import Replies
from dllama.privatelora.settings import BUSY, EdgeSettings
from dllama.privatelora.travel import Rows

CLOUD_PROGRAM = "dllama worker --device auto --model FILE"
AGAIN_SECONDS = 0.2
MOST_LOSSES = 5
"""In one step. A cloud that is there, but hangs at every step, would be tried for ever."""


class EdgeSequence:
    """A sequence: its number at the cloud, the caches of the edge's own layers, and its tokens, to run them again."""

    def __init__(self, number: int, cache: KVCache):
        self.number, self.cache = number, cache
        self.tokens: list[int] = []


class EdgeEngine:
    """A model whose middle layers are worked by a cloud: see `Engine`.

    Raises AdapterError for an adapter that cannot be used, ClusterError for a cloud that cannot, and whatever loading
    raises. A cloud that is lost later is tried again for a while, and has the texts so far run again. ``notify`` and
    ``progress`` as in `Llama`.
    """

    def __init__(
        self,
        model: ModelFile,
        team: Team,
        context: int,
        buffer_type: FloatType,
        kv_type: FloatType,
        settings: EdgeSettings,
        notify: Callable[[str], None],
        progress: Callable[[str, int, int], None],
    ):
        self.config, self.context = model.config, context
        self.cost: tuple[NodeCost, ...] = ()
        self._model, self._settings, self._notify = model, settings, notify
        self._form = FloatType.parse(settings.form)
        first, last = settings.edge_layers
        if first + last >= self.config.n_layers:
            raise ModelError(
                f"--edge-layers {first}:{last} leaves the cloud none of the model's {self.config.n_layers} layers"
            )
        self._first, self._layers = first, range(first, self.config.n_layers - last)
        self._adapter = None if settings.adapter is None else _edge_half(Path(settings.adapter))
        if self._adapter is not None:
            self._adapter.check(self.config)
        self.most_rows = most_rows(None if self._adapter is None else self._adapter.shape, self.config.dim)
        own = [layer for layer in range(self.config.n_layers) if layer not in self._layers]
        adapters = self._own_adapters(own)
        self._stream = Rows(self._form, self.config.dim)
        self._sequences: WeakSet[EdgeSequence] = WeakSet()
        self._known: set[int] = set()  # numbers of the sequences that the cloud holds
        self._numbers = self._step = 0
        self._noise_key = secrets.randbits(128)
        self._digest = model_digest(model, partial(progress, "reading the model"))
        self._hub: _CloudHub | None = None
        self._answers: Answers | None = None
        try:  # a cloud that is not there, or will not have this edge, shows before anything is compiled or loaded
            self._connect(settings.connect_timeout)
        except LinkLost as lost:
            raise ClusterError(f"cloud {settings.cloud}: {lost.reason}") from None
        act, cache = (tags.BY_NAME[kind.name.lower()] for kind in (buffer_type, kv_type))
        try:
            with compiling(self.config, buffer_type, kv_type, notify, *["adapters"] * (adapters is not None)):
                if self._adapter is not None:
                    self._answers = Answers(self._adapter, self._layers, self._form)
                    replies.prepare(self._answers.tag)
                loaded = partial(progress, "loading weights")
                self._forward = Forward(model, team, act, cache, context, loaded, adapters=adapters, only=own)
        except BaseException:
            self.close()
            raise

    def sequence(self, adapter: int = NO_ADAPTER) -> EdgeSequence:
        """An empty sequence; all have the edge's adapter."""
        self._numbers += 1
        own = NO_ADAPTER if self._forward.adapters is None else 0
        sequence = EdgeSequence(self._numbers, self._forward.sequence(own))
        self._sequences.add(sequence)
        return sequence

    def step(self, rows: Sequence[Row], wanted: Sequence[int], reduction: Reduction) -> list[Candidates]:
        require_unchanged(self._model)
        x, losses = self._forward.embeddings(rows), 0
        while True:
            try:
                if self._hub is None:
                    self._reconnect()
                    self._replay()
                found = self._run(x, rows, wanted, reduction)
                break
            except LinkLost as lost:
                losses += 1
                if losses == MOST_LOSSES:
                    raise ClusterError(f"cloud {self._settings.cloud} is lost again and again: {lost.reason}") from None
                self._notify(f"cloud {self._settings.cloud} is lost at token {rows[-1].position}: {lost.reason}")
        for row in rows:
            row.sequence.tokens[row.position :] = [row.token]
        return found

    def close(self) -> None:
        """Takes leave of the cloud."""
        if self._hub is not None:
            with suppress(LinkLost):
                self._hub.link.send(wire.encode(wire.Bye()))
                self._hub.receive(1000)  # its own, after which nothing is left there
            self._hub.close()
            self._hub = None

    # --- a step ---

    def _run(self, x: np.ndarray, rows: Sequence[Row], wanted: Sequence[int], reduction: Reduction) -> list[Candidates]:
        """Raises LinkLost; the cloud has to be made ready again then, and after whatever else it raises."""
        hub, self._hub = self._hub, None
        try:
            found = self._run_with(_Meter(hub), x, rows, wanted, reduction)
        except BaseException:
            hub.close()
            raise
        self._hub = hub
        return found

    def _run_with(
        self, meter: _Meter, x: np.ndarray, rows: Sequence[Row], wanted: Sequence[int], reduction: Reduction
    ) -> list[Candidates]:
        start = time.perf_counter()
        places = [Place(row.sequence.cache, row.position) for row in rows]
        if self._first:
            parts = [self._forward.first_layers(x[span], places[span], self._first) for span in spans(len(rows))]
            x = np.concatenate(parts)
        if self._settings.noise:
            x = x + np.float32(self._settings.noise) * self._noise(x, rows)
        live = {sequence.number for sequence in self._sequences}
        freed, self._known = self._known - live, live
        self._step += 1
        inside = self._layers.stop == self.config.n_layers  # the last layers are the cloud's
        back = list(wanted) if inside else list(range(len(rows)))
        with sigint_held():  # the cloud would wait for the rest of the step
            enter = wire.Enter(self._step, _runs(rows), back, tuple(freed))
            sent = time.perf_counter()
            meter.send(wire.encode(enter, self._stream.encode(x).data))
            message, payload = self._answer_all(meter, len(rows))
            away = (time.perf_counter() - sent) * 1e3
        found, asked = {}, range(len(back)) if inside else wanted
        if back:
            try:
                stream = self._stream.decode(payload[0] if payload else b"", len(back))
            except ValueError as error:
                raise self._fault(error) from None
            last = [places[row] for row in back]
            for span in spans(len(back)):
                here = [row for row in asked if span.start <= row < span.stop]
                numbers = [row - span.start for row in here]
                logits = self._forward.last_layers(stream[span], last[span], numbers, self._first)
                if span.stop < len(back):  # the next ones take their place
                    logits = logits.copy()
                found |= {row: reduce(values, 0, reduction) for row, values in zip(here, logits, strict=True)}
        elapsed = (time.perf_counter() - start) * 1e3
        own = NodeCost("edge", elapsed - meter.waited_ms, meter.waited_ms, meter.sent, meter.received)
        at_work = message.inference_us / 1e3  # in part while the edge answers, and so does not wait
        cloud = NodeCost(self._settings.cloud, at_work, away - at_work, meter.received, meter.sent)
        self.cost = own, cloud
        return [found[row] for row in asked]

    def _noise(self, x: np.ndarray, rows: Sequence[Row]) -> np.ndarray:
        """Gaussian noise as large as the values themselves, float32 [rows, dim]; the same for a row that is sent again,
        as a cloud that gets to see several could average them."""
        noise = np.empty_like(x)
        for row, values in zip(rows, noise, strict=True):
            stream = np.random.Philox(key=self._noise_key, counter=[0, row.token, row.sequence.number, row.position])
            values[:] = np.random.Generator(stream).standard_normal(len(values), np.float32)
        return noise * np.sqrt(np.square(x).mean(1, keepdims=True))

    def _answer_all(self, meter: _Meter, rows: int) -> tuple[wire.Leave, Sequence]:
        """Answers at each stop until the step is done: what the cloud says then."""
        compiled = meter.replies(self._answers)
        if compiled is not None:
            compiled.begin(self._step, rows)
        while True:
            message, payload = self._next(meter, compiled)
            if type(message) is wire.Low and message.step == self._step and self._answers is not None:
                stop = Stop(message.layer, message.product)
                try:
                    answer = self._answers(stop, payload[0], rows)
                except ValueError as error:
                    raise self._fault(error) from None
                meter.send([wire.unchecked(wire.Answer(*message)), answer.data])
                if compiled is not None:
                    compiled.answered(stop)
            elif type(message) is wire.Leave and message.step == self._step:
                return message, payload
            elif type(message) is not wire.Beat:
                raise self._fault(f"{type(message).__name__}, which nobody waits for")

    def _next(self, meter: _Meter, compiled: Replies | None = None) -> tuple:
        """What the cloud says next that compiled replies do not answer; it says that it is alive, at the least. Raises
        LinkLost, and ClusterError where it refuses for good."""
        frames = compiled and meter.reply(compiled)
        if not frames:
            frames = meter.receive(self._settings.step_timeout * 1000)
        if frames is None:
            raise LinkLost(meter.link, f"no answer for {self._settings.step_timeout:g} s")
        try:
            message, payload = wire.decode(frames)
        except wire.WireError as error:
            raise self._fault(f"what is no message: {error}") from None
        if type(message) is wire.Refuse and message.reason.startswith(BUSY):
            raise LinkLost(meter.link, message.reason)
        if type(message) is wire.Refuse:
            raise ClusterError(f"cloud {self._settings.cloud}: {message.reason}")
        return message, payload

    def _fault(self, words: object) -> ClusterError:
        """What the cloud sent makes no sense: it would send the same again."""
        return ClusterError(f"cloud {self._settings.cloud}: it sent {words}")

    # --- the link ---

    def _connect(self, timeout: float) -> None:
        """Gets to know the cloud, and says what is wanted. Raises LinkLost, ClusterError."""
        settings = self._settings
        hub = _CloudHub(Link(settings.cloud, settings.key, connect_timeout=timeout, program=CLOUD_PROGRAM))
        meter = _Meter(hub)
        try:
            meter.send(wire.encode(wire.Hello(wire.PROTOCOL, __version__, secrets.token_bytes(16), "edge")))
            self._expect(meter, wire.Welcome)
            meter.send(wire.encode(wire.Open(self._session())))
            opened = self._expect(meter, wire.Opened)
        except BaseException:
            hub.close()
            raise
        self._hub, self._known = hub, set()
        a, b = self._layers.start, self.config.n_layers - self._layers.stop
        here = f", and {a} + {b} here" if a or b else ""
        self._notify(f"{len(self._layers)} layers in the cloud {self._settings.cloud} ({opened.device}){here}")

    def _expect(self, meter: _Meter, kind: type):
        """A message of this kind, for which it waits as long as the cloud is heard of: it loads its model, or makes the
        adapter ready, or is in the middle of others' rows."""
        beats = 0
        while True:
            message, _ = self._next(meter)
            if type(message) is kind:
                return message
            if type(message) is not wire.Beat:
                raise self._fault(f"{type(message).__name__} for a {kind.__name__}")
            beats += 1
            if beats == 2:  # one may come of a cloud that answers at once
                self._notify(f"waiting for the cloud {self._settings.cloud}, which is not ready yet")

    def _session(self) -> dict:
        adapter = None
        if self._adapter is not None:
            shape = self._adapter.shape
            adapter = {
                "r_c2d": shape.r_c2d,
                "r_d2c": shape.r_d2c,
                "targets": shape.targets,
                "layers": shape.layers,
                "fingerprint": self._adapter.fingerprint,
                "seed": self._adapter.seed,
            }
        return {
            "model_digest": self._digest,
            "layers": (self._layers.start, self._layers.stop),
            "context": self.context,
            "form": int(self._form),
            "adapter": adapter,
        }

    def _reconnect(self) -> None:
        """Tries until the cloud is back. Raises ClusterError where it is not for too long."""
        end = time.monotonic() + self._settings.reconnect_timeout
        while True:
            try:
                return self._connect(min(self._settings.connect_timeout, max(0.1, end - time.monotonic())))
            except LinkLost as lost:  # or it is busy, perhaps with what we left there
                if time.monotonic() > end:
                    raise ClusterError(f"cloud {self._settings.cloud} is not back: {lost.reason}") from None
            time.sleep(AGAIN_SECONDS)

    def _replay(self) -> None:
        """Runs the tokens of all sequences again. Raises LinkLost."""
        for sequence in list(self._sequences):
            rows = [Row(sequence, position, token) for position, token in enumerate(sequence.tokens)]
            for first in range(0, len(rows), self.most_rows):
                part = rows[first : first + self.most_rows]
                self._run(self._forward.embeddings(part), part, [], Reduction.ALL)

    def _own_adapters(self, own: Sequence[int]) -> AdapterWeights | None:
        """What the adapter adds in the edge's own layers: a LoRA whose B is B·M. AdapterError where A and B of these
        are in the cloud alone."""
        adapter = self._adapter
        if adapter is None or not set(own) & set(adapter.shape.layers):
            return None
        cloud = _cloud_half(adapter, Path(self._settings.adapter))
        matrices = {
            (layer, target): (cloud.a(layer, target), cloud.b(layer, target) @ adapter.m(layer, target))
            for layer, target in adapter.shape.places()
            if layer in own
        }
        lora = LoraAdapter(matrices, float(adapter.shape.r_c2d), name=adapter.name)
        weights = AdapterWeights(ranks_of([lora], self.config), self._model)
        weights.fill(values_of([lora], self.config))
        weights.records = np.ascontiguousarray(weights.records[:, list(own)])
        return weights


class _CloudHub(Hub):
    """Receives from the cloud."""

    def __init__(self, link: Link):
        super().__init__(link)
        self.link = link
        self.replies: Replies | None = None

    def close(self) -> None:
        self.link.close()


class _Meter:
    """The link, with what has gone over it in a step and how long it was waited for."""

    def __init__(self, hub: _CloudHub):
        self._hub, self.link = hub, hub.link
        self.sent = self.received = 0
        self.waited_ms = 0.0

    def send(self, frames: Sequence) -> None:
        self.link.send(frames)
        self.sent += sum(memoryview(frame).nbytes for frame in frames)

    def replies(self, answers: Answers | None) -> Replies | None:
        """What answers by itself on this link, where there is something to answer."""
        if self._hub.replies is None and answers is not None and libzmq.AVAILABLE:
            self._hub.replies = Replies(answers, self.link)
        return self._hub.replies

    def reply(self, compiled: Replies) -> list | None:
        """Lets them answer for a while: the frames of a message that is for others."""
        frames = compiled.go()
        sent, received = compiled.traffic
        self.waited_ms += 1e3 * compiled.waited
        self.sent += sent
        self.received += received + sum(memoryview(frame).nbytes for frame in frames or ())
        return frames

    def receive(self, timeout_ms: float) -> list | None:
        start = time.perf_counter()
        received = self._hub.receive_soon()
        if received is None:
            begun = time.perf_counter()
            received = self._hub.receive(timeout_ms)
            self._hub.waited(time.perf_counter() - begun)
        frames = received and received[1]
        self.waited_ms += (time.perf_counter() - start) * 1e3
        self.received += sum(memoryview(frame).nbytes for frame in frames or ())
        return frames


def _edge_half(path: Path) -> EdgeAdapter:
    """The edge's half, in a file or in the folder that has both."""
    return read_edge(path / EDGE_FILE if path.is_dir() else path)


def _cloud_half(adapter: EdgeAdapter, path: Path) -> CloudAdapter:
    """A and B of an adapter: from its seed, or from the file beside it."""
    if adapter.seed is not None:
        return CloudAdapter(adapter.shape, adapter.seed)
    beside = (path if path.is_dir() else path.parent) / CLOUD_FILE
    if not beside.exists():
        raise AdapterError(f"{adapter.name}: the edge's own layers need its A and B too: put {CLOUD_FILE} beside it")
    cloud = read_cloud(beside)
    adapter.check_pair(cloud)
    return cloud


def _runs(rows: Sequence[Row]) -> list[tuple[int, int, int]]:
    """Rows as runs of one sequence each: its number, the first position, how many."""
    runs: list[tuple[int, int, int]] = []
    for row in rows:
        if runs:
            number, first, count = runs[-1]
            if number == row.sequence.number and first + count == row.position:
                runs[-1] = number, first, count + 1
                continue
        runs.append((row.sequence.number, row.position, 1))
    return runs
