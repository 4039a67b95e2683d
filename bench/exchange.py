"""How long do two nodes take to exchange a partial sum, and what does waiting for one cost?

    python -m bench.exchange

Two processes on this machine, joined by the cluster's own links over loopback. Both have 4,096 values (a partial sum of
Llama-2-7B), send them to the other in Q80, 4,352 bytes, and add up both, again and again: in the clear and encrypted.
`--pause` is the work between two exchanges.
"""

import argparse
import multiprocessing
import time
from dataclasses import asdict, dataclass

import numpy as np
import zmq

from bench.report import Figure, print_table, save
from dllama.cluster.all_reduce import AllReduce
from dllama.cluster.hub import Hub
from dllama.cluster.key import ClusterKey
from dllama.cluster.links import Link
from dllama.cluster.listener import Listener, Peer
from dllama.cluster.mesh import Mesh
from dllama.cluster.rounds import Form
from dllama.cluster.traffic import vector_bytes
from dllama.formats import FloatType

DIM = 4096
NBYTES = vector_bytes(DIM, FloatType.Q80)
TIMEOUT = 10
WARM_UP = 500
IDLE_SECONDS = 2


@dataclass(frozen=True)
class Side:
    """What one node found."""

    exchange_us: list[float]
    cpu_us: float  # of an exchange, the links' own threads included
    idle_cpu: float  # part of a core while it only waits


class Node:
    """One of the two."""

    def __init__(self, hub: Hub, index: int, other: Link | Peer):
        self.hub, self.other = hub, other
        mesh = Mesh(hub, {1 - index: other}, 1, TIMEOUT, lambda *message: None)
        sums = range(DIM // 2), range(DIM // 2, DIM)
        self.exchange = AllReduce(mesh, index, sums, Form.MESH, range(2), FloatType.Q80, 1, 1)
        self.values = np.ones(DIM, np.float32)

    def repeat(self, step: int, count: int, pause_us: float) -> list[float]:
        """So many exchanges: how long each took, in µs."""
        times = []
        self.exchange.begin(step)
        for _ in range(count):
            self.values[:] = 1
            work_until = time.perf_counter() + pause_us / 1e6
            while time.perf_counter() < work_until:
                pass
            start = time.perf_counter()
            self.exchange(self.values.ctypes.data, self.values.nbytes, 1)
            times.append((time.perf_counter() - start) * 1e6)
        return times


def connect(port: int, cluster_key: ClusterKey | None, count: int, pause_us: float) -> None:
    """The node that connects: it says that it is there, and stays until the other one has finished."""
    with Link(f"127.0.0.1:{port}", cluster_key) as link:
        node = Node(Hub(link), 1, link)
        link.send([b"here"])
        node.hub.receive()
        node.repeat(1, WARM_UP, pause_us)
        node.repeat(2, count, pause_us)
        node.hub.receive()


def measure(cluster_key: ClusterKey | None, count: int, pause_us: float) -> Side:
    """What the node that listens finds; the other one is a process of its own."""
    with Listener("127.0.0.1", 0, cluster_key) as listener:
        arguments = (listener.port, cluster_key, count, pause_us)
        process = multiprocessing.get_context("spawn").Process(target=connect, args=arguments)
        process.start()
        hub = Hub(listener)
        other, _ = hub.receive()
        node = Node(hub, 0, other)
        other.send([b"go"])
        node.repeat(1, WARM_UP, pause_us)
        cpu = time.process_time()
        times = node.repeat(2, count, pause_us)
        cpu_us = (time.process_time() - cpu) / count * 1e6 - pause_us
        cpu = time.process_time()
        hub.receive(IDLE_SECONDS * 1000)
        idle_cpu = (time.process_time() - cpu) / IDLE_SECONDS
        other.send([b"end"])
        process.join()
    return Side(times, cpu_us, idle_cpu)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=5000, help="exchanges that count, default %(default)s")
    parser.add_argument("--pause", type=float, default=0, help="µs of work before each, default %(default)s")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each, in turn, default %(default)s")
    options = parser.parse_args()
    rounds = {"in the clear": [], "encrypted": []}
    for _ in range(options.rounds):
        for name, cluster_key in zip(rounds, (None, ClusterKey(*zmq.curve_keypair())), strict=True):
            rounds[name].append(measure(cluster_key, options.count, options.pause))
    figures = {
        name: {
            "exchange_us": Figure.of([Figure.of(side.exchange_us).median for side in sides]),
            "cpu_us": Figure.of([side.cpu_us for side in sides]),
            "idle_cpu": Figure.of([side.idle_cpu for side in sides]),
        }
        for name, sides in rounds.items()
    }
    print(f"\n{NBYTES} bytes each way at once over loopback, {options.pause:g} µs of work in between\n")
    print_table(
        ("", "an exchange", "CPU time of a node", "CPU while it waits"),
        [
            (
                name,
                each["exchange_us"].text(0, " µs"),
                each["cpu_us"].text(0, " µs"),
                f"{100 * each['idle_cpu'].median:.1f} % of a core",
            )
            for name, each in figures.items()
        ],
    )
    save(
        "exchange",
        {
            "question": "exchange",
            "bytes": NBYTES,
            "pause_us": options.pause,
            **{name: {key: asdict(figure) for key, figure in each.items()} for name, each in figures.items()},
        },
    )


if __name__ == "__main__":
    main()
