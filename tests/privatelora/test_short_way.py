"""An edge's way past many stops in one call, over real sockets: the same values as stop by stop."""

import threading
from queue import SimpleQueue

import numpy as np
import pytest

from dllama.cluster import wire
from dllama.cluster.hub import Hub
from dllama.cluster.links import Link
from dllama.cluster.listener import Listener
from dllama.engine.workspace import Place
from dllama.formats import FloatType
from dllama.kernels import libzmq, tags
from dllama.kernels.team import Team
from dllama.privatelora import short_way
from dllama.privatelora.answers import Answers
from dllama.privatelora.backends.cpu import CpuBackend
from dllama.privatelora.backends.torch import open_torch
from dllama.privatelora.passage import PRODUCTS, Passage, Stop, stops
from dllama.privatelora.short_way import EdgeTalk
from tests.engine.models import GQA, QWEN3_MOE, random_model
from tests.privatelora.adapters import strong_halves

pytestmark = pytest.mark.skipif(not libzmq.AVAILABLE, reason="libzmq cannot be called here")
FORM, WAIT_MS, STEP = FloatType.F32, 5000, 300


class Edge:
    """One that answers in a thread of its own, and counts what it has answered."""

    def __init__(self, adapter, layers, rows, listener=None):
        self.listener = listener or Listener("127.0.0.1", 0, None)
        self.link = Link(f"127.0.0.1:{self.listener.port}", None)
        self.answers, self.rows, self.answered = Answers(adapter, layers, FORM), rows, 0
        self.silent_from, self.unanswered = 1 << 30, SimpleQueue()
        self.link.send([b"here"])
        self.peer, _ = self.listener.receive(WAIT_MS)
        self.thread = threading.Thread(target=self.answer)
        self.thread.start()

    def answer(self):
        hub = Hub(self.link)
        while True:
            _, frames = hub.receive()
            message, payload = wire.decode(frames)
            if type(message) is wire.Bye:
                return
            if self.answered < self.silent_from:
                values = self.answers(Stop(message.layer, message.product), payload[0], self.rows)
                self.answered += 1
                self.link.send([wire.unchecked(wire.Answer(*message)), values.data])
            else:
                self.unanswered.put(bytes(payload[0]))

    def close(self):
        self.peer.send(wire.encode(wire.Bye()))
        self.thread.join()
        self.link.close()


BLOCKING = pytest.mark.parametrize("opened", ["one thread", "torch"], indirect=True)
"""Where nobody else waits with the thread that waits for an answer."""


@pytest.fixture(params=["one thread", "two threads", "torch"])
def opened(request):
    """Opens a model with one of the backends, in F32."""
    if request.param == "torch":
        pytest.importorskip("torch", reason="needs torch")
        yield lambda model: open_torch(model, "cpu")
        return
    team = Team(1 if request.param == "one thread" else 2)
    yield lambda model: CpuBackend(model, team, tags.F32, tags.F32)
    team.close()


@pytest.fixture
def edge():
    made = []

    def make(*args):
        made.append(Edge(*args))
        return made[-1]

    yield make
    for each in made:
        each.close()
    for listener in {each.listener for each in made}:
        listener.close()


class Play:
    """A backend with an adapter, and rows to take through its layers."""

    def __init__(self, backend, targets, ranks=(6, 9)):
        self.backend, self.layers = backend, range(backend.config.n_layers)
        self.cloud, self.half = strong_halves(backend.config, targets, ranks=ranks)
        self.number = self.backend.add(self.cloud, self.layers)
        self.stops = list(stops(self.cloud.shape, self.layers))
        self.sequence, self.position = self.backend.sequence(64), 0
        self.random = np.random.default_rng(3)

    def passage(self, rows):
        places = [Place(self.sequence, self.position + i) for i in range(rows)]
        self.position += rows
        return Passage(places, self.number, self.random.standard_normal((rows, self.backend.config.dim), np.float32))

    def stop_by_stop(self, passage, came_from):
        """Without an edge's process: M·A·x in numpy's hands."""
        answers = Answers(self.half, self.layers, FORM)
        for stop in self.stops[self.stops.index(came_from) + 1 if isinstance(came_from, Stop) else 0 :]:
            lows = []
            self.backend.run([passage], came_from, stop, lambda sent, lows=lows: lows.extend(x.copy() for x in sent))
            self.take(passage, stop, lows[0], answers)
            came_from = stop
        return self.backend.finish([passage], came_from, self.layers.stop)[0]

    def take(self, passage, stop, low, answers):
        picked = [i for i in range(low.shape[1]) if self.has(stop, i)]
        sent = np.ascontiguousarray(low[:, picked, : self.cloud.shape.r_c2d])
        self.answer(passage, stop, answers(stop, sent.tobytes(), len(low)).view(np.float32))

    def hear(self, edge, passage, stop):
        _, (_, payload) = Hub(edge.listener).receive(WAIT_MS)
        self.answer(passage, stop, np.frombuffer(payload, np.float32))

    def answer(self, passage, stop, values):
        rows, names = len(passage.places), PRODUCTS[stop.product]
        picked = [i for i in range(len(names)) if self.has(stop, i)]
        passage.answer = np.zeros((rows, len(names), self.cloud.shape.r_d2c), np.float32)
        passage.answer[:, picked] = values.reshape(rows, len(picked), -1)

    def has(self, stop, i):
        return PRODUCTS[stop.product][i] in self.cloud.shape.targets

    def way(self, edge, rows):
        talk = EdgeTalk(self.stops, self.cloud.shape, FORM, edge.peer)
        talk.begin(STEP, rows)
        way = self.backend.short_way([talk])
        way.begin(0, 0)
        return way


@pytest.mark.parametrize("shape, targets", [(GQA, ("q", "k", "v")), (GQA, ("q", "v", "o", "down")), (QWEN3_MOE, "qk")])
def test_the_values_are_those_of_stop_by_stop(tmp_path, opened, edge, shape, targets):
    model = random_model(tmp_path / "m.m", shape)
    one, other = (Play(opened(model), tuple(targets)) for _ in range(2))
    for rows in (5, 1, 1):
        expected = one.stop_by_stop(one.passage(rows), 0)
        far, passage = edge(other.half, other.layers, rows), other.passage(rows)
        way, at = other.way(far, rows), 0
        while True:
            other.backend.go([passage], at, way)
            at = way.at
            if way.answered == [False]:  # it does not wait long where a team of threads waits with it
                assert way.other is None
                other.hear(far, passage, at)
            if way.passed == len(other.stops):
                break
            way.begin(way.passed, 0)
        assert far.answered == len(other.stops) and at == other.stops[-1]
        found = other.backend.finish([passage], at, other.layers.stop)[0]
        np.testing.assert_array_equal(found, expected)


@BLOCKING
def test_another_edge_in_between(tmp_path, opened, edge, monkeypatch):
    """The answer that was taken in last is put away with the passage."""
    monkeypatch.setattr(short_way, "SECONDS", 0)
    model = random_model(tmp_path / "m.m", {**GQA, "n_layers": 3})
    one, other = (Play(opened(model), ("q", "k", "v")) for _ in range(2))
    expected = one.stop_by_stop(one.passage(4), 0)
    far, passage = edge(other.half, other.layers, 4), other.passage(4)
    way = other.way(far, 4)
    other.backend.go([passage], 0, way)
    assert way.passed == 1 and way.at == other.stops[0]
    if way.answered == [False]:  # on a busy machine
        other.hear(far, passage, way.at)
    stranger = Passage([Place(other.backend.sequence(64), 0)], -1, np.ones((1, model.config.dim), np.float32))
    other.backend.finish([stranger], 0, other.layers.stop)
    np.testing.assert_array_equal(other.stop_by_stop(passage, way.at), expected)


@BLOCKING
def test_an_answer_that_comes_late_is_taken_in_from_python(tmp_path, opened, edge):
    model = random_model(tmp_path / "m.m", {**GQA, "n_layers": 3})
    one, other = (Play(opened(model), ("q", "k", "v")) for _ in range(2))
    expected = one.stop_by_stop(one.passage(2), 0)
    far, passage = edge(other.half, other.layers, 2), other.passage(2)
    far.silent_from = 1
    way = other.way(far, 2)
    other.backend.go([passage], 0, way)
    assert way.answered == [False] and way.unfit == [False] and way.other is None
    assert way.passed == 2 and way.at == other.stops[1] and way.waited > 0.05
    answers = Answers(other.half, other.layers, FORM)
    other.answer(passage, way.at, answers(way.at, far.unanswered.get(timeout=5), 2).view(np.float32))
    np.testing.assert_array_equal(other.stop_by_stop(passage, way.at), expected)


@BLOCKING
def test_what_is_not_fit_to_be_sent(tmp_path, opened, edge):
    play = Play(opened(random_model(tmp_path / "m.m", GQA)), ("q", "k", "v"))
    far, passage = edge(play.half, play.layers, 1), play.passage(1)
    passage.x[:] = np.nan
    way = play.way(far, 1)
    play.backend.go([passage], 0, way)
    assert way.unfit == [True] and not far.answered


@BLOCKING
def test_two_edges_together(tmp_path, opened, edge):
    """Each has rows, ranks and values of its own; they come to the same places."""
    model = random_model(tmp_path / "m.m", {**GQA, "n_layers": 3})
    expected, plays, passages = [], [], []
    for ranks, rows in (((6, 9), 2), ((4, 12), 3)):
        alone = Play(opened(model), ("q", "v"), ranks)
        expected.append(alone.stop_by_stop(alone.passage(rows), 0))
        plays.append(Play(plays[0].backend if plays else opened(model), ("q", "v"), ranks))
        passages.append(plays[-1].passage(rows))
    backend, listener = plays[0].backend, Listener("127.0.0.1", 0, None)
    far = [
        edge(play.half, play.layers, len(passage.places), listener)
        for play, passage in zip(plays, passages, strict=True)
    ]
    talks = [EdgeTalk(play.stops, play.cloud.shape, FORM, each.peer) for play, each in zip(plays, far, strict=True)]
    assert talks[0].path == talks[1].path
    for talk, passage in zip(talks, passages, strict=True):
        talk.begin(STEP, len(passage.places))
    way = backend.short_way(talks)
    way.begin(0, 10.0)
    backend.go(passages, 0, way)
    assert way.answered == [True, True] and way.passed == 3 and way.at == plays[0].stops[-1]
    found = backend.finish(passages, way.at, model.config.n_layers)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)
