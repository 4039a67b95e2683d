"""A pulse beats while a hub is listened to, and only then."""

import threading

from dllama.cli.pulse import Pulse
from dllama.cluster.hub import Hub
from dllama.cluster.links import Link
from dllama.cluster.listener import Listener

SECONDS = 0.005


def test_it_beats_while_the_hub_waits():
    beaten = threading.Semaphore(0)
    with Listener("127.0.0.1", 0, None) as listener:
        hub = Hub(listener)
        hub.add(Pulse(beaten.release, SECONDS))
        for _ in range(200):
            if beaten.acquire(blocking=False) and beaten.acquire(blocking=False):
                break
            assert hub.receive(50) is None
        else:
            raise AssertionError("no beat")


def test_no_beat_where_nobody_listens():
    beats = []
    pulse = Pulse(lambda: beats.append(1), SECONDS)
    assert pulse.socket.poll(60_000)  # it has been sent
    assert beats == []
    hub = Hub(pulse)
    hub.receive(0)
    assert len(beats) >= 1


def test_messages_get_through():
    with Listener("127.0.0.1", 0, None) as listener, Link(f"127.0.0.1:{listener.port}", None) as link:
        hub = Hub(listener)
        hub.add(Pulse(lambda: None, SECONDS))
        for i in range(50):
            link.send([b"%d" % i])
            received = None
            while received is None:
                received = hub.receive(1000) or hub.receive_soon()
            assert received[1] == [b"%d" % i]
