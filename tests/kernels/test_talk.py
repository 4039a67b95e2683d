"""A stop in one piece, over real sockets: what is said, what is taken in, and what is left to others."""

import time

import numpy as np
import pytest
import zmq

from dllama.kernels import libzmq, tags
from dllama.kernels.talk import ANSWERED, EDGE, FORMS, STOP, TALK, UNFIT, WAITED_FOR, talk_at
from tests.kernels.test_answer import arrived, travelling

pytestmark = pytest.mark.skipif(not libzmq.AVAILABLE, reason="libzmq cannot be called here")
STOPS = [(0, 0, 0, 0, 2), (6, 0, 3, 2, 1), (8 * 200, 200, 0, 0, 2)]
PICKED = np.array([0, 2, 0])
LOW, ANSWER = b"low", b"answer"
R_C2D, R_D2C, ROWS = 40, 33, 3
LAYERS = {0: (b"\0\0", b"\0\3"), 200: (b"\xcc\xc8\0",)}


class Edge:
    """One that has come to a cloud's router, and has some rows there."""

    def __init__(self, talk, form, rows):
        self.form, self.rows = form, rows
        self.socket = talk.context.socket(zmq.DEALER)
        self.socket.setsockopt(zmq.RCVTIMEO, 3000)
        self.socket.connect(talk.router.getsockopt(zmq.LAST_ENDPOINT).decode())
        self.socket.send(b"here")
        while not talk.router.poll(1000):
            pass
        id, _ = talk.router.recv_multipart()
        self.id, self.headers = np.frombuffer(id, np.uint8), [np.zeros(16, np.uint8) for _ in range(2)]
        for room, prefix in zip(self.headers, (LOW, ANSWER), strict=True):
            room[: len(prefix)] = np.frombuffer(prefix, np.uint8)
        self.known = {
            "form": FORMS.index(form), "rows": rows, "r_c2d": R_C2D, "r_d2c": R_D2C,
            "id": self.id.ctypes.data, "id_bytes": len(id),
            "low": self.headers[0].ctypes.data, "low_bytes": len(LOW),
            "answer": self.headers[1].ctypes.data, "answer_bytes": len(ANSWER),
        }  # fmt: skip

    def answer(self, values, suffix=b"\0\0"):
        self.socket.send_multipart([ANSWER + suffix, travelling(self.form, values).tobytes()])


class Talk:
    """A cloud that is about to talk to some edges, from the first stop on."""

    def __init__(self, *forms, rows=(ROWS, 2)):
        self.context = zmq.Context()
        self.router, self.frames = self.context.socket(zmq.ROUTER), libzmq.Frames()
        self.router.setsockopt(zmq.RCVTIMEO, 100)
        self.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self.router.bind_to_random_port("tcp://127.0.0.1")
        self.edges = [Edge(self, form, n) for form, n in zip(forms, rows, strict=False)]
        self.records, first = np.zeros(len(forms), EDGE), 0
        for record, edge in zip(self.records, self.edges, strict=True):
            for name, value in edge.known.items():
                record[name] = value
            record["first_row"], record["state"] = first, ANSWERED
            first += edge.rows
        self.talks = np.zeros(1, TALK)
        known = {
            "told": -1, "socket": self.router.underlying, "frames": self.frames.place, "blocks": 1,
            "clock": time.CLOCK_MONOTONIC, "until_ns": 1 << 62, "spin_ns": 200_000, "patience_ns": 50_000_000,
        }  # fmt: skip
        for name, value in known.items():
            self.talks[name] = value
        self.low = np.random.default_rng(0).standard_normal((first, 3, 48), np.float32)
        room, out = np.zeros(96, np.float32), np.zeros(first * 96 * 4, np.uint8)
        stops = np.array(STOPS, STOP)
        self.arguments = libzmq.API, stops, self.talks, self.records, PICKED, self.low, room, out

    def stops_at(self, half) -> bool:
        return talk_at(half, self.arguments)

    @property
    def states(self) -> list[int]:
        return self.records["state"].tolist()

    @property
    def heard(self) -> list[bytes]:
        """The message that is none of the answers."""
        return [frame.bytes for frame in self.frames.first(int(self.talks["count"][0]))]

    def close(self):
        for socket in (self.router, *(edge.socket for edge in self.edges)):
            socket.close(0)
        self.context.term()


@pytest.fixture
def talk():
    made = []

    def make(*args):
        made.append(Talk(*args))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.mark.parametrize("forms", [*((form,) for form in FORMS), (tags.Q80, tags.F32)], ids=str)
def test_all_stops(forms, talk):
    talk, random = talk(*forms), np.random.default_rng(1)
    halves = {half: stop for stop in STOPS for half in (stop[0], stop[0] + 1)}
    for half in (0, 1, 2, 3, 4, 5, 6, 7, 8, 1600, 1601, 1602):
        if half not in halves:
            assert not talk.stops_at(half)
            continue
        _, layer, product, first, count = halves[half]
        picked, suffix = PICKED[first : first + count], LAYERS[layer][product == 3]
        if half % 2 == 0:
            assert not talk.stops_at(half) and set(talk.states) == {WAITED_FOR}
            row = 0
            for edge in talk.edges:
                sent = np.ascontiguousarray(talk.low[row : row + edge.rows][:, picked, :R_C2D]).reshape(edge.rows, -1)
                assert edge.socket.recv_multipart() == [LOW + suffix, travelling(edge.form, sent).tobytes()]
                row += edge.rows
            continue
        expected, row = talk.low.copy(), 0
        for edge in talk.edges:
            values = random.standard_normal((edge.rows, count * R_D2C), np.float32)
            edge.answer(values, suffix)
            come = arrived(edge.form, travelling(edge.form, values), count * R_D2C)
            expected[row : row + edge.rows, picked, :R_D2C] = come.reshape(edge.rows, count, -1)
            row += edge.rows
        assert not talk.stops_at(half) and set(talk.states) == {ANSWERED}
        np.testing.assert_allclose(talk.low, expected, rtol=1e-6)
    assert talk.talks["told"] == len(STOPS) - 1 and talk.talks["waited_ns"] > 0 and not talk.heard


def ones(edge):
    return np.ones((edge.rows, 2 * R_D2C), np.float32)


def test_it_goes_on_for_so_long(talk):
    talk = talk(tags.F32)
    talk.talks["until_ns"] = 0
    assert not talk.stops_at(0)
    talk.edges[0].answer(ones(talk.edges[0]))
    assert talk.stops_at(1) and talk.states == [ANSWERED] and talk.talks["told"] == 0


@pytest.mark.parametrize("blocks", [0, 1])
def test_an_answer_that_does_not_come(talk, blocks):
    talk = talk(tags.Q80)
    talk.talks["blocks"] = blocks
    assert not talk.stops_at(0)
    for _ in range(20):
        assert talk.stops_at(1) and talk.states == [WAITED_FOR] and not talk.heard
    assert talk.talks["usual_ns"] > talk.talks["spin_ns"]
    start = time.monotonic()
    assert talk.stops_at(1)
    assert time.monotonic() - start < 0.2
    talk.edges[0].answer(ones(talk.edges[0]))
    assert talk.router.poll(3000)
    assert not talk.stops_at(1) and talk.states == [ANSWERED]


def test_one_of_two_does_not_answer(talk):
    talk = talk(tags.Q80, tags.F16)
    assert not talk.stops_at(0)
    talk.edges[1].answer(ones(talk.edges[1]))
    assert talk.stops_at(1) and talk.states == [WAITED_FOR, ANSWERED] and not talk.heard
    assert 40e6 < talk.talks["waited_ns"] < 1e9


def test_values_that_are_not_fit_to_be_sent(talk):
    talk = talk(tags.Q80, tags.Q80)
    talk.low[1, 2, 3] = np.nan
    assert not talk.stops_at(0), "the product is still to come for the others"
    assert talk.states == [UNFIT, WAITED_FOR] and talk.stops_at(1)
    assert talk.edges[1].socket.poll(3000) and not talk.edges[0].socket.poll(100)


FULL = bytes(4 * ROWS * 2 * R_D2C)


@pytest.mark.parametrize(
    "frames",
    [
        [b"something", b"else"],
        [ANSWER + b"\0\0"],
        [ANSWER + b"\0\0", b"short"],
        [ANSWER + b"\0\1", FULL],
        [ANSWER + b"\0\0\0", FULL],
        [ANSWER + b"\0\0", FULL, b"more"],
        [ANSWER + b"\0\0", np.full(ROWS * 2 * R_D2C, np.inf, np.float32).tobytes()],
    ],
    ids=["other", "no payload", "short", "other stop", "longer header", "too many frames", "infinite"],
)
def test_what_is_no_answer_is_left_to_others(talk, frames):
    talk = talk(tags.F32)
    assert not talk.stops_at(0)
    talk.edges[0].socket.send_multipart(frames)
    assert talk.router.poll(3000)
    assert talk.stops_at(1) and talk.states == [WAITED_FOR]
    assert talk.heard == [talk.edges[0].id.tobytes(), *frames]


def test_a_second_answer_and_a_stranger_s(talk):
    talk = talk(tags.F32, tags.F32)
    assert not talk.stops_at(0)
    stranger = Edge(talk, tags.F32, ROWS)
    for edge in (talk.edges[0], talk.edges[0]):
        edge.answer(ones(edge))
    assert talk.stops_at(1) and talk.states == [ANSWERED, WAITED_FOR]
    assert talk.heard[0] == talk.edges[0].id.tobytes()
    stranger.answer(ones(stranger))
    assert talk.stops_at(1) and talk.states == [ANSWERED, WAITED_FOR]
    assert talk.heard[0] == stranger.id.tobytes()
    stranger.socket.close(0)


def test_an_edge_that_has_gone(talk):
    talk = talk(tags.F32)
    talk.edges[0].socket.close(0)
    time.sleep(0.1)
    assert not talk.stops_at(0)
    assert talk.stops_at(1) and talk.states == [WAITED_FOR] and not talk.heard
