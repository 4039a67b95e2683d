"""An edge's answers in one call, over real sockets: the same bytes as one by one, and all else left to others."""

import numpy as np
import pytest

from dllama.cluster import wire
from dllama.cluster.hub import Hub
from dllama.cluster.links import Link
from dllama.cluster.listener import Listener
from dllama.engine.workspace import MAX_ROWS
from dllama.formats import FloatType
from dllama.kernels import libzmq
from dllama.privatelora.passage import Stop, targets_of
from dllama.privatelora.replies import Replies
from dllama.privatelora.travel import Rows
from tests.privatelora.test_answers import FORMS, made

pytestmark = pytest.mark.skipif(not libzmq.AVAILABLE, reason="libzmq cannot be called here")
WAIT_MS, STEP = 5000, 70_000
RANKS = (33, 5)


class Cloud:
    """What an edge's replies are for."""

    def __init__(self, form=FloatType.F32, targets=("q", "v", "down")):
        self.answers, self.half = made(form, RANKS, targets)
        self.form, self.random = form, np.random.default_rng(5)
        self.listener = Listener("127.0.0.1", 0, None)
        self.link = Link(f"127.0.0.1:{self.listener.port}", None)
        self.link.send([b"here"])
        self.peer, _ = self.listener.receive(WAIT_MS)
        self.peer.send([b"there"])
        self.link.receive(WAIT_MS)
        self.replies = Replies(self.answers, self.link)

    def low(self, stop, rows):
        """The message of a stop, and the payload of its answer."""
        width = RANKS[0] * len(targets_of(self.half.shape, stop.product))
        values = Rows(self.form, width).encode(self.random.standard_normal((rows, width), np.float32)).tobytes()
        return [wire.unchecked(wire.Low(STEP, *stop)), values], self.answers(stop, values, rows).tobytes()

    def heard(self):
        return Hub(self.listener).receive(WAIT_MS)[1]

    def close(self):
        self.link.close()
        self.listener.close()


@pytest.fixture
def cloud():
    made = []

    def make(*args):
        made.append(Cloud(*args))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("rows", [1, 5, MAX_ROWS])
def test_every_stop(cloud, form, rows):
    cloud = cloud(form)
    stops = cloud.answers.stops
    assert [stop.product for stop in stops] == [0, 3, 0, 3]
    for _ in range(2):
        traffic, waited = np.zeros(2, int), 0.0
        cloud.replies.begin(STEP, rows)
        sent = [cloud.low(stop, rows) for stop in stops]
        for message, _ in sent:
            cloud.peer.send(message)
        assert cloud.link.socket.poll(WAIT_MS)
        while cloud.replies._state["next"] < len(stops):
            assert cloud.replies.go() is None
            traffic += cloud.replies.traffic
            waited += cloud.replies.waited
        for stop, (_, payload) in zip(stops, sent, strict=True):
            header, found = cloud.heard()
            assert header == wire.unchecked(wire.Answer(STEP, *stop)) and bytes(found) == payload
        header_bytes = sum(len(message[0]) for message, _ in sent)
        payloads = sum(len(payload) for _, payload in sent), sum(len(message[1]) for message, _ in sent)
        assert traffic.tolist() == [header_bytes + nbytes for nbytes in payloads] and waited > 0


def test_what_is_for_others(cloud):
    cloud = cloud()
    (first, _), (second, payload) = (cloud.low(stop, 2) for stop in cloud.answers.stops[:2])
    nothing_yet = [wire.unchecked(wire.Low(STEP, *cloud.answers.stops[1])), second[1]]
    broken = [first[0], np.full(len(first[1]) // 4, np.nan, np.float32).tobytes()]
    for message in (wire.encode(wire.Beat()), nothing_yet, [first[0]], [first[0], first[1][:-1]], broken):
        cloud.replies.begin(STEP, 2)
        cloud.peer.send(message)
        assert cloud.link.socket.poll(WAIT_MS)
        assert list(map(bytes, cloud.replies.go())) == list(map(bytes, message))
        assert cloud.replies.traffic == (0, 0)
    cloud.replies.answered(cloud.answers.stops[0])  # from Python, perhaps
    cloud.peer.send(second)
    assert cloud.link.socket.poll(WAIT_MS)
    assert cloud.replies.go() is None
    assert bytes(cloud.heard()[1]) == payload


def test_nothing_comes(cloud):
    cloud = cloud()
    cloud.replies.begin(STEP, 1)
    assert cloud.replies.go() is None and 0.05 < cloud.replies.waited < 1


def test_a_step_of_many_rows_is_for_others(cloud):
    cloud, stop = cloud(), Stop(0, 0)
    message, _ = cloud.low(stop, MAX_ROWS + 1)
    cloud.replies.begin(STEP, MAX_ROWS + 1)
    cloud.peer.send(message)
    assert cloud.replies.go() is None and cloud.replies.waited == 0
    cloud.replies.answered(stop)
    assert list(map(bytes, cloud.link.receive(WAIT_MS))) == message
