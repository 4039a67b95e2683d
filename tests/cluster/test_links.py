"""Links that come up, that do not, and that break."""

import contextlib
import gc
import http.server
import os
import socket
import threading
import time

import pytest

from dllama.cluster.hub import Hub
from dllama.cluster.key import generate
from dllama.cluster.links import Link, LinkLost
from dllama.cluster.listener import Listener
from dllama.errors import ClusterError
from tests.cluster import nodes
from tests.cluster.processes import Process

KEY, OTHER = generate(), generate()

LOST_MS = 5000
"""In which a dead node has to be noticed."""


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def to(listener: Listener) -> str:
    return f"127.0.0.1:{listener.port}"


def loss(link: Link, *others) -> str:
    """Why a link is lost, while others are served too."""
    with pytest.raises(LinkLost) as error:
        assert Hub(link, *others).receive(LOST_MS) is None
    assert error.value.source is link
    assert str(error.value) == f"{link.name}: {link.lost}"
    return link.lost


@pytest.mark.parametrize("key", [None, KEY], ids=["clear", "encrypted"])
def test_messages_there_and_back(key):
    large = os.urandom(3 << 20)
    with Listener("127.0.0.1", 0, key) as listener, Link(to(listener), key) as link:
        for frames in ([b"header"], [b"header", b"payload"], [b"", b""], [b"header", large]):
            link.send(frames)
            peer, arrived = listener.receive(LOST_MS)
            assert arrived == frames
            peer.send(arrived)
            back = link.receive(LOST_MS)
            assert back == frames
            assert [type(frame) for frame in back] == [bytes if len(frame) < 1 << 16 else memoryview for frame in back]
        assert peer.name == "127.0.0.1"
        assert link.up and link.lost is None


def test_ipv6():
    with Listener("::1", 0, KEY) as listener, Link(f"[::1]:{listener.port}", KEY) as link:
        link.send([b"hello"])
        peer, frames = listener.receive(LOST_MS)
        assert (peer.name, frames) == ("::1", [b"hello"])


def test_large_frames_are_not_copied_and_small_ones_are():
    large, small = bytearray(1 << 20), bytearray(1 << 10)
    with Link(f"127.0.0.1:{free_port()}", None) as link:
        link.send([b"header", memoryview(large)])
        link.send([b"header", memoryview(small)])
        small.append(1)
        with pytest.raises(BufferError):  # somebody still reads it where it is
            large.append(1)


def test_a_worker_that_starts_later_is_reached_and_gets_what_was_sent_before():
    port = free_port()
    with Link(f"127.0.0.1:{port}", KEY) as link:
        link.send([b"early"])
        assert link.receive(300) is None
        assert not link.up and link.lost is None
        with Listener("127.0.0.1", port, KEY) as listener:
            assert Hub(listener, link).receive(LOST_MS)[1] == [b"early"]


def test_nothing_listens():
    with Link(f"127.0.0.1:{free_port()}", KEY, connect_timeout=0.3) as link:
        assert loss(link) == "nothing listens there; is 'dllama worker' running?"


@pytest.mark.parametrize(
    "theirs, ours, reason",
    [
        (KEY, OTHER, "it has another cluster key"),
        (KEY, None, "it asks for the cluster key, and --insecure was given here"),
        (None, KEY, "it runs with --insecure, and here the cluster key is asked for"),
    ],
)
def test_without_the_key_no_link_comes_up(theirs, ours, reason):
    with Listener("127.0.0.1", 0, theirs) as listener:
        with Link(to(listener), ours) as link:
            link.send([b"let me in"])
            assert loss(link, listener) == reason
        with Link(to(listener), theirs) as link:
            link.send([b"a friend"])
            assert Hub(listener, link).receive(LOST_MS)[1] == [b"a friend"]


@pytest.mark.parametrize("key", [None, KEY], ids=["clear", "encrypted"])
@pytest.mark.parametrize(
    "words", [b"SSH-2.0-OpenSSH_9.6\r\n", b"\xff" * 100, b"\xff\0\0\0\0\0\0\0\1\x7f\3\1NULL", b"\0"]
)
def test_another_program_that_talks(key, words):
    def talk():
        while True:
            try:
                connection, _ = server.accept()
            except OSError:
                return
            with connection, contextlib.suppress(OSError):
                connection.sendall(words)
                connection.recv(10)

    with socket.create_server(("127.0.0.1", 0)) as server:
        threading.Thread(target=talk, daemon=True).start()
        with Link(f"127.0.0.1:{server.getsockname()[1]}", key) as link:
            assert loss(link) == "what answers there is no dllama worker"
        server.shutdown(socket.SHUT_RDWR)


def test_an_http_server(tmp_path):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler) as server:
        server.RequestHandlerClass.log_message = lambda *_: None
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        with Link(f"127.0.0.1:{server.server_port}", KEY) as link:
            assert "dllama worker" in loss(link)
        server.shutdown()
        thread.join()


@pytest.mark.parametrize("address", ["shelf", "10.0.0.2:x", "nonesuch.invalid:9998"])
def test_addresses_without_sense(address):
    with pytest.raises(ClusterError, match=address.partition(":")[0]):
        Link(address, KEY)


@pytest.mark.parametrize("secure", [False, True], ids=["clear", "encrypted"])
def test_a_killed_worker_is_lost_and_stays_lost(secure):
    key = KEY if secure else None
    with Process(nodes.echo, key) as worker, Link(worker.address, key) as link:
        link.send([b"hello"])
        assert link.receive(LOST_MS) == [b"hello"]
        worker.kill()
        assert loss(link) == "the connection broke"
        with Listener("127.0.0.1", worker.port, key):
            for _ in range(2):
                with pytest.raises(LinkLost, match="the connection broke"):
                    link.send([b"still there?"])
                with pytest.raises(LinkLost, match="the connection broke"):
                    link.receive(0)


def test_stopped_nodes_are_noticed_on_both_sides_and_silent_connections_dropped():
    with Listener("127.0.0.1", 0, None) as listener, Process(nodes.echo, None) as worker:
        idle = socket.create_connection(("127.0.0.1", listener.port))
        with idle, Link(worker.address, None) as link, Process(nodes.hello, to(listener)) as stranger:
            peer, frames = listener.receive(LOST_MS)
            assert frames == [b"hello"]
            link.send([b"hello"])
            assert link.receive(LOST_MS) == [b"hello"]
            worker.stop()
            stranger.stop()
            hub, lost = Hub(link, listener), set()
            for _ in range(2):
                with pytest.raises(LinkLost, match="the connection broke") as error:
                    hub.receive(LOST_MS)
                lost.add(error.value.source)
            assert lost == {link, peer}
            idle.setblocking(False)  # it has been closed meanwhile
            while idle.recv(100):
                pass


def test_a_worker_that_takes_in_nothing_is_lost():
    with Link(f"127.0.0.1:{free_port()}", None) as link:
        with pytest.raises(LinkLost, match="takes in nothing any more"):
            for _ in range(100_000):
                link.send([b"again"])
        assert loss(link) == "it takes in nothing any more"


def test_a_closed_link_says_so():
    link = Link(f"127.0.0.1:{free_port()}", None)
    link.close()
    link.close()
    for use in (lambda: link.send([b"hello"]), link.receive):
        with pytest.raises(LinkLost, match="this side closed the link"):
            use()


def test_a_message_beyond_the_limit_costs_the_link():
    with Listener("127.0.0.1", 0, None) as listener, Link(to(listener), None, max_message_bytes=1000) as link:
        link.send([b"hello"])
        peer, _ = listener.receive(LOST_MS)
        peer.send([b"header", bytes(1001)])
        assert loss(link) == "the connection broke"


def test_whoever_sends_says_that_the_connection_broke():
    with Listener("127.0.0.1", 0, None) as listener, Link(to(listener), None, max_message_bytes=1000) as link:
        link.send([b"hello"])
        peer, _ = listener.receive(LOST_MS)
        peer.send([b"welcome"])
        assert link.receive(LOST_MS) == [b"welcome"]
        peer.send([bytes(1001)])
        with pytest.raises(LinkLost, match="the connection broke"):
            for _ in range(300):
                link.send([b"hello"])
                time.sleep(0.01)


def test_nothing_is_left_open():
    def run():
        with Listener("127.0.0.1", 0, KEY) as listener, Link(to(listener), KEY) as link:
            link.send([b"hello", bytes(1 << 17)])
            peer, frames = listener.receive(LOST_MS)
            peer.send([bytes(frames[1])])
            assert len(link.receive(LOST_MS)[0]) == 1 << 17
        with Link(f"127.0.0.1:{free_port()}", KEY, connect_timeout=0.01) as link:
            loss(link)

    def left() -> tuple[int, int]:
        gc.collect()
        return len(os.listdir("/proc/self/fd")), threading.active_count()

    run()  # what ZeroMQ keeps for the whole process
    before = left()
    for _ in range(5):
        run()
    assert left() == before
