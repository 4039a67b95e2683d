"""Nodes measured together: all at the same time, and without those that are lost meanwhile."""

import threading
import time
from contextlib import contextmanager, suppress

import pytest

from dllama import Llama, SamplerSettings
from dllama.cluster import earlier, speeds, wire
from dllama.cluster.links import Link, LinkLost
from dllama.cluster.listener import Listener
from dllama.cluster.settings import ClusterSettings
from dllama.cluster.speeds import ROUNDS, speeds_together
from dllama.errors import ClusterError

PROMPT, STEPS, FAULT_AT = "Question: Tom has 3 apples", 16, 5
MEASURING = "measuring how fast the nodes are, all at once"
SLOW = {"speeds": (1e5,)}
"""So slow, as the root is taken to be, that several nodes are faster than one."""


@contextmanager
def answering(answer):
    """A link to what answers a `Measure` with the messages ``answer(message)``."""
    with Listener("127.0.0.1", 0, None) as listener:

        def serve():
            with suppress(LinkLost):  # at the end
                while True:
                    peer, frames = listener.receive()
                    for message in answer(wire.decode(frames)[0]):
                        peer.send(wire.encode(message) if isinstance(message, tuple) else message)

        thread = threading.Thread(target=serve)
        thread.start()
        with Link(f"127.0.0.1:{listener.port}", None) as link:
            yield link
        thread.join()


def measured(speed):
    return lambda message: [wire.Measured(*message, speed)]


def test_the_means_of_all_rounds(monkeypatch):
    own = iter((1e9, 2e9, 4e9))
    monkeypatch.setattr(speeds, "read_speed", lambda team: next(own))
    with answering(measured(3e9)) as a, answering(lambda m: [wire.Measured(*m, 6e9 / (1 + m.round))]) as b:
        # as long as all rounds take together: of 1, 1/2 and 1/4 s for each GB, and of 1/6, 2/6 and 3/6
        assert speeds_together(None, [a, b], epoch=7) == pytest.approx([3e9 / 1.75, 3e9, 3e9])


def test_all_measure_at_the_same_time(monkeypatch):
    """Each waits, in the middle of its measurement, until the others are there too."""
    together = threading.Barrier(3, timeout=20)
    monkeypatch.setattr(speeds, "read_speed", lambda team: together.wait() + 1.0)

    def answer(message):
        return [wire.Measured(*message, together.wait() + 1.0)]

    with answering(answer) as a, answering(answer) as b:
        assert len(speeds_together(None, [a, b], epoch=1)) == 3


def test_what_else_a_worker_says_does_not_count(monkeypatch):
    monkeypatch.setattr(speeds, "read_speed", lambda team: 1e9)

    def answer(message):
        other = wire.Measured(message.epoch, ROUNDS + 1, 7e9), wire.Measured(message.epoch - 1, message.round, 7e9)
        return [wire.Beat(), wire.Loading(message.epoch, 0, 1), *other, wire.Measured(*message, 2e9)]

    with answering(answer) as link:
        assert speeds_together(None, [link], epoch=1) == pytest.approx([1e9, 2e9])


@pytest.mark.parametrize(
    "said, reason",
    [
        ([wire.Refuse("no more memory")], "no more memory"),
        ([wire.Bye()], "it has left"),
        ([[b"GET / HTTP/1.1"]], "it sends what is no message: .*"),
        ([[b"\x93\x1e\x01\x00"]], "it sends what is no message: .*"),
        ([], "it has not been heard of for 0.2 s"),
    ],
    ids=["refuses", "leaves", "noise", "half a message", "silent"],
)
def test_a_worker_that_does_not_measure(monkeypatch, said, reason):
    monkeypatch.setattr(speeds, "read_speed", lambda team: 1e9)
    monkeypatch.setattr(speeds, "SILENCE_SECONDS", 0.2)
    with answering(measured(1e9)) as good, answering(lambda message: said) as bad:
        with pytest.raises(LinkLost, match=f": {reason}$") as error:
            speeds_together(None, [good, bad], epoch=1)
        assert error.value.source is bad


def test_a_worker_that_takes_long_is_waited_for_while_it_says_so(monkeypatch):
    monkeypatch.setattr(speeds, "read_speed", lambda team: 1e9)
    monkeypatch.setattr(speeds, "SILENCE_SECONDS", 0.5)

    def answer(message):
        for _ in range(4):
            time.sleep(0.2)
            yield wire.Loading(message.epoch, 0, 1)
        yield wire.Measured(*message, 2e9)

    with answering(answer) as link:
        assert speeds_together(None, [link], epoch=1) == pytest.approx([1e9, 2e9])


# --- in a cluster -------------------------------------------------------------------------------------------------


def cluster(*workers, **options):
    settings = ClusterSettings(tuple(worker.address for worker in workers), None)
    return Llama(nthreads=1, buffer_float_type="f32", cluster=settings, **options)


def test_a_worker_that_is_lost_at_a_start_while_it_measures(workers):
    first, second = workers(2, **SLOW)
    address = second.address

    def notify(line):
        if line == MEASURING:
            second.kill()

    with pytest.raises(ClusterError, match=f"^worker {address}: the connection broke$"):
        cluster(first, second, notify=notify)


def test_a_worker_that_is_lost_while_nodes_are_measured_again(workers, monkeypatch):
    with Llama(nthreads=1, buffer_float_type="f32") as llama:
        expected = [piece.text for piece in llama.generate(PROMPT, STEPS, SamplerSettings(temperature=0))]
    monkeypatch.setattr(speeds, "read_speed", lambda team: SLOW["speeds"][0])
    first, second = workers(2, **SLOW)
    said, address = [], second.address

    def notify(line):
        said.append(line)
        if said.count(MEASURING) == 2 and second.alive:
            second.kill()

    with cluster(first, second, notify=notify) as llama:
        assert len(llama.plan.shares) == 3
        pieces = []
        for piece in llama.generate(PROMPT, STEPS, SamplerSettings(temperature=0)):
            pieces.append(piece.text)
            if len(pieces) == FAULT_AT:
                (earlier.cache_folder() / "nodes.json").unlink()
                first.kill()
        assert pieces == expected
        assert len(llama.plan.shares) == 1
    assert f"worker {address} is lost while the nodes were measured: the connection broke; going on without it" in said
