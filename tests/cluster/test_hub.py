"""Several links at once: who gets a turn, and when a loss is told."""

import time

import pytest

from dllama.cluster.hub import Hub
from dllama.cluster.links import Link, LinkLost
from dllama.cluster.listener import Listener

WAIT_MS = 5000


@pytest.fixture
def pairs():
    """Three listeners, and a link to each."""
    listeners = [Listener("127.0.0.1", 0, None) for _ in range(3)]
    links = [Link(f"127.0.0.1:{listener.port}", None) for listener in listeners]
    yield list(zip(listeners, links, strict=True))
    for node in (*links, *listeners):
        node.close()


def test_all_are_heard(pairs):
    listeners, links = zip(*pairs, strict=True)
    for i, link in enumerate(links):
        link.send([b"%d" % i])
    hub = Hub(*listeners)
    heard = [hub.receive(WAIT_MS) for _ in pairs]
    assert sorted(frames for _, frames in heard) == [[b"0"], [b"1"], [b"2"]]
    for peer, frames in heard:
        peer.send(frames)
    hub = Hub(*links)
    assert dict(hub.receive(WAIT_MS) for _ in pairs) == {link: [b"%d" % i] for i, link in enumerate(links)}


def test_who_says_much_does_not_keep_others_waiting(pairs):
    listeners, links = zip(*pairs, strict=True)
    hub, peers = Hub(*links), []
    for listener, link in pairs:
        link.send([b"hello"])
        peers.append(listener.receive(WAIT_MS)[0])
    for _ in range(500):
        peers[0].send([b"much"])
    peers[1].send([b"little"])
    peers[2].send([b"little"])
    heard = [hub.receive(WAIT_MS)[0] for _ in range(502)]
    assert set(heard) == set(links)
    listeners[1].close()
    for _ in range(500):
        peers[0].send([b"much"])
    with pytest.raises(LinkLost) as error:
        for _ in range(500):
            hub.receive(WAIT_MS)
            time.sleep(0.001)
    assert error.value.source is links[1]


def test_what_was_said_before_a_loss_is_heard_first(pairs):
    listener, link = pairs[0]
    link.send([b"hello"])
    peer, _ = listener.receive(WAIT_MS)
    words = [[b"word %d" % i, bytes(1000)] for i in range(20)]
    for frames in words:
        peer.send(frames)
    hub = Hub(link)
    assert hub.receive(WAIT_MS) == (link, words[0])  # so all are on their way
    time.sleep(0.2)
    listener.close()
    for frames in words[1:]:
        assert hub.receive(WAIT_MS) == (link, frames)
    with pytest.raises(LinkLost):
        hub.receive(WAIT_MS)


def test_a_loss_is_told_once_and_the_others_go_on(pairs):
    (lost, link), (listener, other) = pairs[:2]
    for node in (link, other):
        node.send([b"hello"])
    lost.receive(WAIT_MS)
    peer, _ = listener.receive(WAIT_MS)
    hub = Hub(link, other)
    lost.close()
    with pytest.raises(LinkLost) as error:
        hub.receive(WAIT_MS)
    assert error.value.source is link
    assert hub.receive(0) is None
    peer.send([b"hello"])
    assert hub.receive(WAIT_MS) == (other, [b"hello"])


def test_closed_and_removed_links_are_not_waited_for(pairs):
    (_, first), (_, second), (listener, third) = pairs
    hub = Hub(first, second, third)
    first.close()
    hub.remove(second)
    third.send([b"hello"])
    listener.receive(WAIT_MS)[0].send([b"hello"])
    assert hub.receive(WAIT_MS) == (third, [b"hello"])
    assert hub.receive(0) is None
    third.close()
    assert hub.receive(0) is None
    assert Hub().receive(0) is None
