"""The links of one node to all the others while they run a model together, and what they say of a step."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence

from dllama.cluster import wire
from dllama.cluster.hub import Hub
from dllama.cluster.links import Link, LinkLost
from dllama.cluster.listener import Peer
from dllama.errors import ClusterError

BEAT_SECONDS = 0.5
"""How often a node that waits tells the others that it does."""
SILENT_SECONDS = 3 * BEAT_SECONDS
EARLY = 4
"""Messages of later rounds that are kept for one node. A node can be ahead by a round or two."""
ROUNDS = (wire.Part, wire.Candidates)
"""What nodes say of a step."""

Endpoint = Link | Peer


class NodeLost(ClusterError):
    """A node that does not answer any more: its number and the reason."""

    def __init__(self, node: int, reason: str):
        super().__init__(reason)
        self.node, self.reason = node, reason


def blamed(message: wire.Lost, sender: int, names: Sequence[str]) -> NodeLost:
    """Which node the root has to do without where one tells that it has lost another. ``names``: of all nodes."""
    if not 0 < message.index < len(names):  # it has not lost the root, as the root has heard it
        return NodeLost(sender, f"it has lost its link to node {message.index}: {message.reason}")
    return NodeLost(message.index, f"worker {names[sender]} cannot reach it: {message.reason}")


class Mesh:
    """Links to the other nodes by their numbers, 0 being the root.

    ``other(endpoint, message, payload)`` is called with whatever else comes, from wherever; what it raises ends the
    wait. ``timeout``: seconds after which a node that is waited for counts as lost though its link stands.
    """

    def __init__(self, hub: Hub, endpoints: Mapping[int, Endpoint], epoch: int, timeout: float, other: Callable):
        self._hub, self._epoch, self._timeout, self._other = hub, epoch, timeout, other
        self.endpoints = dict(endpoints)
        self._numbers = {endpoint: node for node, endpoint in endpoints.items()}
        self._early = {node: {} for node in endpoints}
        self._heard = dict.fromkeys(endpoints, 0.0)  # when each of them said anything while this one waited
        self._next_beat = 0.0
        self.sent_bytes = self.received_bytes = 0

    def send(self, node: int, message, *payload) -> None:
        """Raises NodeLost."""
        frames = wire.encode(message, *payload)
        self.sent_bytes += sum(map(len, frames))
        try:
            self.endpoints[node].send(frames)
        except LinkLost as lost:
            raise NodeLost(node, lost.reason) from None

    def post(self, nodes: Collection[int], frames: Sequence[bytes]) -> None:
        """The same frames, made by `wire.encode` or the like, to several nodes. Raises NodeLost."""
        for node in nodes:
            try:
                self.endpoints[node].send(frames)
            except LinkLost as lost:
                raise NodeLost(node, lost.reason) from None
        self.sent_bytes += len(nodes) * sum(map(len, frames))

    def collect_parts(self, header: bytes, nodes: Collection[int], take: Callable) -> None:
        """Calls ``take(node, payload)`` with each node's part of a round, as it comes.

        ``header``: the one that all of these parts have; one that is equal needs no decoding. Raises NodeLost.
        """
        missing = self._take_early(header, nodes, take)
        deadline = None
        while missing:
            received = self._hub.receive_soon()
            if received is not None:
                node, frames = self._numbers.get(received[0]), received[1]
                if node in missing and frames[0] == header and len(frames) == 2:
                    self.received_bytes += len(header) + len(frames[1])
                    missing.discard(node)
                    take(node, frames[1])
                    continue
            else:
                start = time.monotonic()
                deadline = deadline or start + self._timeout
                received = self._receive(missing, deadline)
                self._hub.waited(time.monotonic() - start)
            found = self._understand(received)
            if found is None:
                continue
            node, message, frames = found
            if node in missing and frames[0] == header:
                missing.discard(node)
                take(node, frames[1])
            else:
                self.keep(node, message, frames)

    def collect(self, nodes: Collection[int], step: int, take: Callable) -> None:
        """Calls ``take(node, message, payload)`` with each node's candidates of a step. Raises NodeLost."""
        missing = self._take_early(step, nodes, lambda node, found: take(node, *found))
        deadline = time.monotonic() + self._timeout
        while missing:
            found = self._understand(self._receive(missing, deadline))
            if found is None:
                continue
            node, message, frames = found
            if node in missing and type(message) is wire.Candidates and message.step == step:
                missing.discard(node)
                take(node, message, frames[1:])
            else:
                self.keep(node, message, frames)

    @property
    def has_early(self) -> bool:
        """Whether anything has been put aside."""
        return any(self._early.values())

    def early(self, node: int, place: bytes | int):
        """What has been put aside, and is no longer then: a part's payload by its header, candidates by their step.

        None where there is none.
        """
        return self._early[node].pop(place, None)

    def wait(self, missing: Collection[int], deadline: float | None, blocks: bool = True) -> float:
        """Waits for a message, from wherever, and puts it aside if it is part of a step; not where it does not block
        and none is there. Those who are missing have time until the deadline, which is returned. Raises NodeLost."""
        deadline = deadline or time.monotonic() + self._timeout
        received = self._receive(missing, deadline, blocks)
        if received is not None:
            self.hear(received)
        return deadline

    def hear(self, received: tuple) -> None:
        """Understands a message as the hub returns it, and puts aside what is part of a step. Raises NodeLost."""
        found = self._understand(received)
        if found:
            self.keep(*found)

    def keep(self, node: int, message, frames: Sequence) -> None:
        """Puts aside what belongs to a later round. Raises NodeLost for a node that sends too much of it."""
        early = self._early[node]
        if len(early) == EARLY:
            raise NodeLost(node, "it sends parts of rounds that are not due")
        if type(message) is wire.Part:
            early[bytes(frames[0])] = frames[1]
        else:
            early[message.step] = message, frames[1:]

    def _take_early(self, place: bytes | int, nodes: Collection[int], take: Callable) -> set[int]:
        """Takes what had been put aside; the nodes that are still missing."""
        missing = set(nodes)
        for node in nodes:
            early = self.early(node, place)
            if early is not None:
                missing.discard(node)
                take(node, early)
        return missing

    def look(self) -> None:
        """Takes in what has come while nothing was waited for. Raises NodeLost, for a link that has broken too."""
        while (received := self._received(0)) is not None:
            self._understand(received)

    def heard(self, node: int, since: float) -> float:
        """When a node last said anything while it was listened to, by `time.monotonic`, ``since`` at the earliest."""
        return max(since, self._heard[node])

    def number(self, endpoint: Endpoint) -> int | None:
        """The node at the other end."""
        return self._numbers.get(endpoint)

    def _receive(self, missing: Collection[int], deadline: float, blocks: bool = True) -> tuple | None:
        """The next message, from wherever; None where it does not block and none is there. Raises NodeLost, also for a
        node that is to blame at the deadline."""
        while True:
            now = time.monotonic()
            if now > deadline:
                self._blame(missing, now, deadline)
            if now > self._next_beat:
                self._next_beat = now + BEAT_SECONDS
                for node in self.endpoints:
                    self.send(node, wire.Beat())
            received = self._received(1e3 * BEAT_SECONDS if blocks else 0)
            if received is not None or not blocks:
                return received

    def _blame(self, missing: Collection[int], now: float, deadline: float) -> None:
        """Raises NodeLost for a missing node that is not just waiting itself: that says so. If all do, they get as much
        time again. Whether the root is there is told by its link alone."""
        others = [node for node in missing if node != 0]
        silent = [node for node in others if now > self._heard[node] + SILENT_SECONDS]
        if now > deadline + self._timeout:
            silent = silent or others
        if silent:
            node = min(silent, key=self._heard.__getitem__)
            raise NodeLost(node, f"it has not answered for {self._timeout:g} s")

    def _received(self, timeout_ms: float) -> tuple | None:
        """A message, or None after the timeout. Raises NodeLost."""
        while True:
            try:
                return self._hub.receive(timeout_ms)
            except LinkLost as lost:
                node = self._numbers.get(lost.source)
                if node is not None:
                    raise NodeLost(node, lost.reason) from None

    def _understand(self, received: tuple) -> tuple | None:
        """Node, message and frames of what a node says of a step of this epoch; None for all else, which is handled."""
        endpoint, frames = received
        node = self._numbers.get(endpoint)
        if node is not None:
            self._heard[node] = time.monotonic()
        try:
            message, payload = wire.decode(frames)
        except wire.WireError as error:
            if node is not None:
                raise NodeLost(node, f"it sends what is no message: {error}") from None
            return None
        if type(message) not in ROUNDS or node is None:
            self._other(endpoint, message, payload)
            return None
        if message.epoch != self._epoch:
            return None
        self.received_bytes += sum(map(len, frames))
        return node, message, frames
