"""A worker's port in a hostile world: it lives on, and serves whoever has the key."""

import os
import random
import socket
import time

import pytest
import zmq

from dllama.cluster import wire
from dllama.cluster.hub import Hub
from dllama.cluster.key import generate
from dllama.cluster.links import Link, LinkLost
from dllama.cluster.listener import Listener
from dllama.errors import ClusterError
from tests.cluster import nodes
from tests.cluster.processes import Process

KEY, OTHER = generate(), generate()
WAIT_MS = 5000

GREETING = b"\xff" + bytes(7) + b"\x01\x7f\x03\x01"
NULL = GREETING + b"NULL".ljust(20, b"\0") + bytes(32)
CURVE = GREETING + b"CURVE".ljust(20, b"\0") + bytes(32)

NOISE = {
    "nothing": b"",
    "http": b"GET / HTTP/1.1\r\nHost: shelf\r\n\r\n",
    "tls": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "half a greeting": NULL[:30],
    "an older protocol": b"\x01\x00\x05hello\x00\x05world",
    "an older protocol, a large frame": b"\xff" + bytes(7) + b"\x01\x7f\x01\x05\xff" + b"\x7f" * 8,
    "no handshake": NULL + b"\x00\x05hello" * 9,
    "a command that is none": NULL + b"\x04\x05\x05HELLO",
    "a large command": NULL + b"\x06" + b"\x7f" * 8 + b"x" * 100,
    "properties that lie": NULL + b"\x04\x1a\x05READY\x0bSocket-Type\xff\xff\xff\xffDEA",
    "encrypted, no handshake": CURVE + b"\x00\x05hello" * 9,
    "encrypted, a handshake of zeros": CURVE + b"\x04\xc8\x05HELLO\x01\x00" + bytes(192),
}


@pytest.fixture(params=[None, KEY], ids=["clear", "encrypted"])
def listener(request):
    with Listener("127.0.0.1", 0, request.param, max_message_bytes=1 << 17) as listener:
        listener.key, listener.lines = request.param, []
        listener._log = listener.lines.append
        yield listener


def serves(listener) -> None:
    """A proper node is served, and nothing else has arrived."""
    with Link(f"127.0.0.1:{listener.port}", listener.key) as link:
        link.send([b"hello"])
        peer, frames = Hub(listener, link).receive(WAIT_MS)
        assert frames == [b"hello"]
        peer.send([b"welcome"])
        assert link.receive(WAIT_MS) == [b"welcome"]
    with pytest.raises(LinkLost) as error:
        listener.receive(WAIT_MS)
    assert error.value.source is peer


def raw(listener, noise: bytes) -> None:
    """Send this over a plain connection, and wait until it has been taken or refused."""
    with socket.create_connection(("127.0.0.1", listener.port)) as connection:
        connection.settimeout(WAIT_MS / 1000)
        try:
            connection.sendall(noise)
            connection.shutdown(socket.SHUT_WR)
            while connection.recv(1000):
                pass
        except OSError:
            pass


def dealer(listener, **options) -> zmq.Socket:
    """A socket of ZeroMQ that is set up in another way than a Link."""
    dealer = zmq.Context.instance().socket(zmq.DEALER)
    dealer.linger = 0
    if listener.key:
        dealer.curve_publickey, dealer.curve_secretkey = listener.key
        dealer.curve_serverkey = listener.key.public
    for name, value in options.items():
        setattr(dealer, name, value)
    dealer.connect(f"tcp://127.0.0.1:{listener.port}")
    return dealer


@pytest.mark.parametrize("noise", NOISE.values(), ids=NOISE)
def test_noise(listener, noise):
    raw(listener, noise)
    assert listener.receive(0) is None
    serves(listener)
    assert any(line.startswith("a connection was dropped: ") for line in listener.lines)


def test_random_bytes(listener):
    random_ = random.Random(1)
    for _ in range(100):
        start = random_.choice((b"", GREETING, NULL, CURVE))
        raw(listener, start + random_.randbytes(random_.randrange(300)))
        assert listener.receive(0) is None
    serves(listener)


def test_a_frame_beyond_the_limit_drops_its_sender(listener):
    with Link(f"127.0.0.1:{listener.port}", listener.key) as link:
        link.send([b"header", bytes((1 << 17) + 1)])
        with pytest.raises(LinkLost, match="the connection broke"):
            Hub(link, listener).receive(WAIT_MS)
    serves(listener)


def test_more_frames_than_any_message_has(listener):
    with dealer(listener) as strange:
        strange.send_multipart([b"frame"] * 1000)
        _, frames = listener.receive(WAIT_MS)
        with pytest.raises(wire.WireError):
            wire.decode(frames)
        strange.send_multipart(wire.encode(wire.Beat()))
        assert wire.decode(listener.receive(WAIT_MS)[1]) == (wire.Beat(), [])


def test_a_node_cannot_choose_its_name(listener):
    with dealer(listener, routing_id=b"root") as strange:
        strange.send(b"hello")
        assert listener.receive(200) is None
    listener.receive(0)
    serves(listener)


def test_the_public_half_of_the_key_is_not_enough():
    lines = []
    with (
        Listener("127.0.0.1", 0, KEY, log=lines.append) as listener,
        zmq.Context.instance().socket(zmq.DEALER) as thief,
    ):
        thief.linger = 0
        thief.curve_publickey, thief.curve_secretkey = OTHER
        thief.curve_serverkey = KEY.public
        thief.connect(f"tcp://127.0.0.1:{listener.port}")
        thief.send(b"let me in")
        for _ in range(100):
            assert listener.receive(50) is None
            if lines:
                break
        assert lines == ["a connection was dropped: it has another cluster key"]
        listener.key = KEY
        serves(listener)


def test_listeners_with_different_keys_in_one_process():
    with Listener("127.0.0.1", 0, KEY) as first, Listener("127.0.0.1", 0, OTHER) as second:
        for listener, key in ((first, KEY), (second, OTHER)):
            listener.key = key
            serves(listener)
        first.close()
        serves(second)


def test_a_peer_that_has_gone(listener):
    with Link(f"127.0.0.1:{listener.port}", listener.key) as link:
        link.send([b"one"])
        link.send([b"two"])
        peer, _ = Hub(listener, link).receive(WAIT_MS)
        listener.receive(WAIT_MS)
    with pytest.raises(LinkLost, match="127.0.0.1: the connection broke") as error:
        listener.receive(WAIT_MS)
    assert error.value.source is peer and peer.lost
    for _ in range(2):
        with pytest.raises(LinkLost):
            peer.send([b"still there?"])
    assert listener.receive(0) is None


def test_what_a_peer_leaves_behind_does_no_harm_to_the_next():
    """Its connection gets the descriptor of the one before, whose messages are still to be read."""
    heard, lost = [], []
    with Listener("127.0.0.1", 0, None) as listener:
        address = f"127.0.0.1:{listener.port}"
        with Process(nodes.hello, address, 20):
            first, _ = listener.receive(WAIT_MS)
            time.sleep(0.2)  # until the others have come too
        with Process(nodes.hello, address):
            time.sleep(0.5)
            while len(heard) < 20 or not lost:
                try:
                    received = listener.receive(WAIT_MS)
                    assert received, (heard, lost)
                    heard.append(received[0])
                except LinkLost as loss:
                    lost.append(loss.source)
            assert listener.receive(200) is None
    (second,) = set(heard) - {first}
    assert lost == [first] and heard.count(second) == 1


def test_a_peer_of_a_closed_listener(listener):
    with Link(f"127.0.0.1:{listener.port}", listener.key) as link:
        link.send([b"hello"])
        peer, _ = listener.receive(WAIT_MS)
        listener.close()
        listener.close()
        with pytest.raises(LinkLost, match="this side closed the link"):
            peer.send([b"hello"])


def test_two_connections_are_two_peers(listener):
    address = f"127.0.0.1:{listener.port}"
    with Link(address, listener.key) as one, Link(address, listener.key) as other:
        one.send([b"one"])
        other.send([b"other"])
        hub = Hub(listener, one, other)
        peers = {frames[0]: peer for peer, frames in (hub.receive(WAIT_MS), hub.receive(WAIT_MS))}
        for name, peer in peers.items():
            peer.send([name])
        assert (one.receive(WAIT_MS), other.receive(WAIT_MS)) == ([b"one"], [b"other"])


def test_a_port_in_use():
    with Listener("127.0.0.1", 0, KEY) as listener:
        with pytest.raises(ClusterError, match=f"port {listener.port} is in use"):
            Listener("127.0.0.1", listener.port, KEY)
        listener.key = KEY
        serves(listener)


@pytest.mark.parametrize(
    "host, reason",
    [("192.0.2.1", "192.0.2.1 is no address of this device"), ("nonesuch.invalid", "no such host")],
)
def test_hosts_that_are_not_here(host, reason):
    with pytest.raises(ClusterError, match=reason):
        Listener(host, 0, None)


def test_a_name_of_this_device():
    with Listener("localhost", 0, None) as listener:
        listener.key = None
        serves(listener)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may listen anywhere")
def test_a_port_for_root_alone():
    with pytest.raises(ClusterError, match="permission denied"):
        Listener("127.0.0.1", 1, None)
