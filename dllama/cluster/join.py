"""The links between the workers of a plan."""

from __future__ import annotations

import time

from dllama.cluster import wire
from dllama.cluster.desk import Desk, Superseded
from dllama.cluster.job import Job
from dllama.cluster.key import ClusterKey
from dllama.cluster.links import Link, LinkLost
from dllama.cluster.mesh import Endpoint, NodeLost
from dllama.errors import ClusterError

JOIN_SECONDS = 10.0
"""How long workers try to reach each other."""
TICK_MS = 200


class Joining:
    """This worker's links to a job's other workers: it calls those before it, and those after it call.

    They are closed with it.
    """

    def __init__(self, desk: Desk, job: Job, key: ClusterKey | None):
        self._desk, self._job, self._key = desk, job, key
        self._links: dict[Link, int] = {}

    def endpoints(self) -> dict[int, Endpoint]:
        """What leads to each other node, the root included. Raises NodeLost for one that cannot be reached, RootGone,
        and Superseded."""
        job = self._job
        deadline = time.monotonic() + JOIN_SECONDS
        answered: dict[int, Endpoint] = {}
        self._call()
        while True:
            called = range(job.index + 1, len(job.addresses))
            later = {node: self._desk.joined.get((job.epoch, node)) for node in called}
            missing = [node for node in range(1, job.index) if node not in answered]
            missing += [node for node, peer in later.items() if peer is None]
            if not missing:
                return {0: self._desk.root, **answered, **later}
            if time.monotonic() > deadline:
                raise NodeLost(missing[0], f"no answer within {JOIN_SECONDS:g} s")
            self._receive(answered)

    def close(self) -> None:
        for link in self._links:
            if not link.socket.closed:
                self._desk.hub.remove(link)
                link.close()

    def _call(self) -> None:
        for node in range(1, self._job.index):
            try:
                link = Link(self._job.addresses[node], self._key, connect_timeout=JOIN_SECONDS)
                self._links[link] = node
                self._desk.hub.add(link)
                link.send(wire.encode(wire.Join(self._desk.session, self._job.epoch, self._job.index)))
            except ClusterError as error:
                raise NodeLost(node, str(error)) from None

    def _receive(self, answered: dict[int, Endpoint]) -> None:
        try:
            received = self._desk.receive(TICK_MS)
        except LinkLost as lost:
            if lost.source in self._links:
                raise NodeLost(self._links[lost.source], lost.reason) from None
            return
        if received is None:
            return
        source, message, frames = received
        if source is self._desk.root:
            raise Superseded(message, frames[1:])
        if source in self._links and message == wire.Joined(self._job.epoch, self._job.index):
            answered[self._links[source]] = source
