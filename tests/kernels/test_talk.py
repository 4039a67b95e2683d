"""A stop in one piece, over real sockets: what is said, what is taken in, and what is left to others."""

import time

import numpy as np
import pytest
import zmq

from dllama.kernels import libzmq, tags
from dllama.kernels.talk import DONE, FORMS, LATE, LONG, OTHER, STOP, TALK, UNFIT, talk_at
from tests.kernels.test_answer import arrived, travelling

pytestmark = pytest.mark.skipif(not libzmq.AVAILABLE, reason="libzmq cannot be called here")
STOPS = [(0, 0, 0, 0, 2), (6, 0, 3, 2, 1), (8 * 200, 200, 0, 0, 2)]
PICKED = np.array([0, 2, 0])
LOW, ANSWER = b"low", b"answer"
R_C2D, R_D2C, ROWS = 40, 33, 3
LAYERS = {0: (b"\0\0", b"\0\3"), 200: (b"\xcc\xc8\0",)}


class Talk:
    """A cloud that is about to talk to an edge, from the first stop on."""

    def __init__(self, form, rows=ROWS):
        self.context = zmq.Context()
        self.router, self.edge = self.context.socket(zmq.ROUTER), self.context.socket(zmq.DEALER)
        self.router.setsockopt(zmq.RCVTIMEO, 100)
        self.edge.setsockopt(zmq.RCVTIMEO, 3000)
        self.edge.setsockopt(zmq.LINGER, 0)
        self.edge.connect(f"tcp://127.0.0.1:{self.router.bind_to_random_port('tcp://127.0.0.1')}")
        self.edge.send(b"here")
        while not self.router.poll(1000):
            pass
        self.form, (id, _) = form, self.router.recv_multipart()
        self.id, self.frames = np.frombuffer(id, np.uint8), libzmq.Frames()
        self.headers = [np.zeros(16, np.uint8) for _ in range(2)]
        for room, prefix in zip(self.headers, (LOW, ANSWER), strict=True):
            room[: len(prefix)] = np.frombuffer(prefix, np.uint8)
        self.talks = np.zeros(1, TALK)
        known = {
            "form": FORMS.index(form), "rows": rows, "r_c2d": R_C2D, "r_d2c": R_D2C,
            "socket": self.router.underlying, "id": self.id.ctypes.data, "id_bytes": len(id),
            "low": self.headers[0].ctypes.data, "low_bytes": len(LOW),
            "answer": self.headers[1].ctypes.data, "answer_bytes": len(ANSWER), "frames": self.frames.place,
            "clock": time.CLOCK_MONOTONIC, "until_ns": 1 << 62, "spin_ns": 200_000, "blocks": 1,
        }  # fmt: skip
        for name, value in known.items():
            self.talks[name] = value
        self.low = np.random.default_rng(0).standard_normal((rows, 3, 48), np.float32)
        self.arguments = (
            libzmq.API, np.array(STOPS, STOP), self.talks, PICKED, self.low, np.zeros(96, np.float32),
            np.zeros(rows * 96 * 4, np.uint8),
        )  # fmt: skip

    def at(self, half) -> int | None:
        """Why it stops behind a half; None where it goes on."""
        return int(self.talks["stop"][0]) if talk_at(half, self.arguments) else None

    def answer(self, values, header=ANSWER + b"\0\0"):
        self.edge.send_multipart([header, travelling(self.form, values).tobytes()])
        assert self.router.poll(3000)

    def close(self):
        self.router.close(0)
        self.edge.close(0)
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


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
def test_all_stops(form, talk):
    talk, random = talk(form), np.random.default_rng(1)
    halves = {half: stop for stop in STOPS for half in (stop[0], stop[0] + 1)}
    for half in (0, 1, 2, 3, 4, 5, 6, 7, 8, 1600, 1601, 1602):
        if half not in halves:
            assert talk.at(half) is None
            continue
        _, layer, product, first, count = halves[half]
        picked, suffix = PICKED[first : first + count], LAYERS[layer][product == 3]
        if half % 2 == 0:
            sent = np.ascontiguousarray(talk.low[:, picked, :R_C2D]).reshape(ROWS, -1)
            assert talk.at(half) is None
            assert talk.edge.recv_multipart() == [LOW + suffix, travelling(form, sent).tobytes()]
            continue
        values = random.standard_normal((ROWS, count * R_D2C), np.float32)
        talk.answer(values, ANSWER + suffix)
        before = talk.low.copy()
        assert talk.at(half) is None
        before[:, picked, :R_D2C] = arrived(form, travelling(form, values), count * R_D2C).reshape(ROWS, count, -1)
        np.testing.assert_allclose(talk.low, before, rtol=1e-6)
        assert talk.talks["stop"] == (DONE if layer == 200 else LONG)


def test_it_goes_on_for_so_long(talk):
    talk = talk(tags.F32)
    talk.talks["until_ns"] = 0
    assert talk.at(0) is None
    talk.answer(np.ones((ROWS, 2 * R_D2C), np.float32))
    assert talk.at(1) == LONG and talk.talks["next"] == 1


@pytest.mark.parametrize("blocks", [0, 1])
def test_an_answer_that_does_not_come(talk, blocks):
    talk = talk(tags.Q80)
    talk.talks["blocks"] = blocks
    for _ in range(20):
        talk.talks["next"] = 0
        assert talk.at(1) == LATE and talk.talks["next"] == 0
    assert talk.talks["usual_ns"] > talk.talks["spin_ns"]
    start = time.monotonic()
    assert talk.at(1) == LATE
    assert time.monotonic() - start < 0.2
    talk.answer(np.ones((ROWS, 2 * R_D2C), np.float32))
    assert talk.at(1) is None and talk.talks["next"] == 1


def test_values_that_are_not_fit_to_be_sent(talk):
    talk = talk(tags.Q80)
    talk.low[1, 2, 3] = np.nan
    assert talk.at(0) == UNFIT
    assert not talk.edge.poll(100)


@pytest.mark.parametrize(
    "frames",
    [
        [b"something", b"else"],
        [ANSWER + b"\0\0"],
        [ANSWER + b"\0\0", b"short"],
        [ANSWER + b"\0\1", bytes(4 * ROWS * 2 * R_D2C)],
        [ANSWER + b"\0\0\0", bytes(4 * ROWS * 2 * R_D2C)],
        [ANSWER + b"\0\0", bytes(4 * ROWS * 2 * R_D2C), b"more"],
        [ANSWER + b"\0\0", np.full(ROWS * 2 * R_D2C, np.inf, np.float32).tobytes()],
    ],
    ids=["other", "no payload", "short", "other stop", "longer header", "too many frames", "infinite"],
)
def test_what_is_no_answer_is_left_to_others(talk, frames):
    talk = talk(tags.F32)
    talk.edge.send_multipart(frames)
    assert talk.router.poll(3000)
    assert talk.at(1) == OTHER and talk.talks["next"] == 0
    found = [frame.bytes for frame in talk.frames.first(int(talk.talks["count"][0]))]
    assert found == [talk.id.tobytes(), *frames]


def test_another_edge(talk):
    talk = talk(tags.F32)
    other = talk.context.socket(zmq.DEALER)
    other.connect(talk.router.getsockopt(zmq.LAST_ENDPOINT).decode())
    other.send_multipart([ANSWER + b"\0\0", bytes(4 * ROWS * 2 * R_D2C)])
    assert talk.router.poll(3000)
    assert talk.at(1) == OTHER
    other.close(0)


def test_an_edge_that_has_gone(talk):
    talk = talk(tags.F32)
    talk.router.setsockopt(zmq.ROUTER_MANDATORY, 1)
    talk.edge.close(0)
    time.sleep(0.1)
    assert talk.at(0) is None and talk.at(1) == LATE
