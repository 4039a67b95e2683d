"""Exchanges through compiled code: the same sums, the same messages, and the mesh for all that goes wrong."""

import threading
import time

import numpy as np
import pytest

from dllama.cluster import direct, wire
from dllama.cluster.all_reduce import AllReduce
from dllama.cluster.hub import Hub
from dllama.cluster.links import Link
from dllama.cluster.listener import Listener
from dllama.cluster.mesh import Mesh, NodeLost
from dllama.cluster.rounds import Form, meetings
from dllama.formats import FloatType

DIM, ROWS, EPOCH = 64, 2, 1
pytestmark = pytest.mark.skipif(not direct.AVAILABLE, reason="libzmq cannot be called from outside pyzmq")


class Node:
    """One of several nodes in this process, each of which is used by a thread of its own."""

    def __init__(self, index: int, nodes: int, form: Form, ports: list, together: threading.Barrier, compiled: bool):
        self.index, self.nodes, self.heard = index, nodes, []
        self.listener = Listener("127.0.0.1", 0, None)
        ports[index] = self.listener.port
        together.wait()
        self.hub = Hub(self.listener)
        self.endpoints = {other: Link(f"127.0.0.1:{ports[other]}", None) for other in range(index)}
        for link in self.endpoints.values():
            self.hub.add(link)
            link.send([b"%d" % index])
        while len(self.endpoints) < nodes - 1:
            peer, frames = self.hub.receive(5000)
            self.endpoints[int(frames[0])] = peer
        together.wait()
        self.mesh = Mesh(self.hub, self.endpoints, EPOCH, 1.0, lambda *heard: self.heard.append(heard[1]))
        sums = [range(DIM * i // nodes // 32 * 32, DIM * (i + 1) // nodes // 32 * 32) for i in range(nodes)]
        order = range(nodes)[::-1]
        self.exchange = AllReduce(self.mesh, index, sums, form, order, FloatType.F32, EPOCH, ROWS)
        if not compiled:
            self.exchange._direct = None
        self.x = np.zeros((ROWS, DIM), np.float32)

    def sum(self, values: float) -> np.ndarray:
        self.x[:] = values
        self.exchange(self.x.ctypes.data, self.x.strides[0], ROWS)
        return self.x

    def close(self):
        for endpoint in self.endpoints.values():
            if isinstance(endpoint, Link):
                endpoint.close()
        self.listener.close()


def run(nodes: int, work, form: Form = Form.BUTTERFLY, compiled=lambda index: True) -> list:
    """``work(node)`` of each node in a thread of its own: what they return, or raise."""
    ports, together, found = [0] * nodes, threading.Barrier(nodes, timeout=30), [None] * nodes

    def one(index: int) -> None:
        node = None
        try:
            node = Node(index, nodes, form, ports, together, compiled(index))
            found[index] = work(node)
        except Exception as error:
            found[index] = error
        finally:
            together.wait()
            if node:
                node.close()

    threads = [threading.Thread(target=one, args=(index,)) for index in range(nodes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


@pytest.mark.parametrize(
    "form, nodes", [*((Form.BUTTERFLY, nodes) for nodes in (2, 3, 4, 6)), *((Form.FOLD, nodes) for nodes in (2, 3, 5))]
)
@pytest.mark.parametrize("mixed", [False, True])
def test_sums(form, nodes, mixed):
    """Over more rounds than a byte counts; also where some of the nodes do without compiled code."""

    def work(node):
        sums = []
        for step in (1, 2):
            node.exchange.begin(step)
            sums += [float(node.sum(node.index + number).max()) for number in range(150)]
            assert float(node.x.min()) == sums[-1]
        return sums, node.mesh.sent_bytes, node.mesh.received_bytes

    found = run(nodes, work, form, lambda index: not (mixed and index % 2))
    expected = [float(sum(range(nodes)) + nodes * number) for _ in (1, 2) for number in range(150)]
    for node, (sums, sent, received) in enumerate(found):
        assert sums == expected
        met = meetings(form, range(nodes)[::-1], node)
        beats = sent - 2 * moved([len(meeting.to) for meeting in met])
        assert beats >= 0, "signs of life, where one has waited for long"
        assert received == 2 * moved([len(meeting.of) for meeting in met])


def moved(messages: list[int]) -> int:
    """Bytes of 150 exchanges with so many messages in each round, headers included."""
    parts = 150 * sum(messages) * 4 * DIM * ROWS
    return parts + sum(
        count * len(wire.unchecked(wire.Part(EPOCH, 1, number * len(messages) + round)))
        for number in range(150)
        for round, count in enumerate(messages)
    )


def test_other_messages_go_to_the_mesh():
    def work(node):
        node.exchange.begin(1)
        for other in node.endpoints:
            node.mesh.send(other, wire.Beat())
        node.sum(1)
        return node.heard, float(node.x[0, 0])

    assert run(2, work) == [([wire.Beat()], 2.0)] * 2


def test_a_part_of_another_size():
    def work(node):
        node.exchange.begin(1)
        if node.index == 0:
            node.mesh.send(1, wire.Part(EPOCH, 1, 0), bytes(4 * DIM))
            return None
        node.sum(1)

    _, error = run(2, work)
    assert isinstance(error, NodeLost) and error.node == 0 and "256 bytes" in error.reason


def test_a_node_that_says_nothing():
    def work(node):
        node.exchange.begin(1)
        if node.index == 0:
            node.sum(1)

    error, _ = run(2, work)
    assert isinstance(error, NodeLost) and (error.node, error.reason) == (1, "it has not answered for 1 s")


def test_a_node_that_goes():
    def work(node):
        node.exchange.begin(1)
        if node.index == 1:
            return node.close()
        node.sum(1)

    error, _ = run(2, work)
    assert isinstance(error, NodeLost) and (error.node, error.reason) == (1, "the connection broke")


def test_a_node_that_talks_all_the_time():
    """It keeps nobody from noticing that it says nothing to the matter."""
    noticed = threading.Event()

    def work(node):
        node.exchange.begin(1)
        if node.index == 0:
            try:
                node.sum(1)
            finally:
                noticed.set()
        end = time.monotonic() + 8
        while not noticed.is_set() and time.monotonic() < end:
            node.mesh.send(0, wire.Beat())
            time.sleep(0.02)
        return noticed.is_set()

    error, in_time = run(2, work)
    assert isinstance(error, NodeLost) and (error.node, error.reason) == (1, "it has not answered for 1 s")
    assert in_time
