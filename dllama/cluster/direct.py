"""The short way of parts between nodes: all that is due and sound goes through compiled code, all else to the mesh."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import zmq

from dllama.cluster import hub, wire
from dllama.cluster.mesh import Mesh, NodeLost
from dllama.cluster.rounds import Form, Meeting
from dllama.kernels import libzmq
from dllama.kernels.headers import Prefix
from dllama.kernels.jit import compiled
from dllama.kernels.tags import Tag
from dllama.kernels.trade import FAILED, GROUP, NODE, OTHER, STATE, WAIT_MS, example, trade
from dllama.kernels.travel import decode_sum, encode

AVAILABLE = libzmq.AVAILABLE


def serves(form: Form) -> bool:
    """Whether exchanges of this form can take the short way here."""
    return AVAILABLE and form is not Form.SCATTER


def prepare(*forms: Tag) -> None:
    """Compiles what exchanges of these forms need. It takes a while, in which a thread can say nothing."""
    for form in forms:
        compiled(encode, form, 0, 0, 0, 0, 0)
        compiled(decode_sum, form, np.zeros(1, np.int64), 0, 0, 0, 0)
        if AVAILABLE:
            _compiled(*example(form))


def _compiled(*arguments):
    return compiled(trade, *arguments, 0, 0, False, 0, 0, 0, 0, 0)


class Direct:
    """Sums rows over nodes, in rounds.

    ``meetings``: this node's rounds; ``index``: its own number; ``slots``: for each node room for its part, uint8;
    ``columns``: values in a row.

    arguments: the first ones of `trade`
    """

    def __init__(
        self,
        mesh: Mesh,
        meetings: Sequence[Meeting],
        index: int,
        slots: Sequence[np.ndarray],
        columns: int,
        tag: Tag,
    ):
        self._mesh, self._slots, self._columns, self._tag = mesh, slots, columns, tag
        others = [list(dict.fromkeys(meeting.to + meeting.of)) for meeting in meetings]
        self._numbers = [node for group in others for node in group]
        self._endpoints = [mesh.endpoints[node] for node in self._numbers]
        owners = [list(dict.fromkeys(mesh.endpoints[node].owner for node in group)) for group in others]
        self._owners = [owner for group in owners for owner in group]
        self._ids = [np.frombuffer(endpoint.routing_id, np.uint8) for endpoint in self._endpoints]
        self._nodes = np.zeros(len(self._numbers), NODE)
        self._nodes["socket"] = [endpoint.owner.socket.underlying for endpoint in self._endpoints]
        self._nodes["id"] = [id.ctypes.data for id in self._ids]
        self._nodes["id_bytes"] = [len(id) for id in self._ids]
        self._nodes["slot"] = [slots[node].ctypes.data for node in self._numbers]
        self._nodes["sends"], self._nodes["expects"] = (
            [node in getattr(meeting, name) for meeting, nodes in zip(meetings, others, strict=True) for node in nodes]
            for name in ("to", "of")
        )
        self._items = np.zeros(len(self._owners), libzmq.ITEM)
        self._items["socket"] = [owner.socket.underlying for owner in self._owners]
        self._items["events"] = zmq.POLLIN
        summed = [meeting.summed for meeting in meetings]
        self._sources = np.array([slots[node].ctypes.data for nodes in summed for node in nodes])
        self._groups = np.zeros(len(meetings) + 1, GROUP)
        for name, parts in (("nodes", others), ("items", owners), ("sources", summed)):
            self._groups[name] = np.cumsum([0, *map(len, parts)])
        self._first_due = [number for number, group in enumerate(others) for _ in group]
        self._prefix, self._frames = Prefix(), libzmq.Frames()
        self._states = np.zeros(1, STATE)
        self._state = self._states[0]
        self._state["prefix"], self._state["frames"] = self._prefix.address, self._frames.place
        self._state["part"], self._state["clock"] = slots[index].ctypes.data, time.CLOCK_MONOTONIC
        self._state["spin_ns"] = int(1e9 * hub.SPIN_SECONDS)
        self._own = slots[index]
        self.arguments = tag, libzmq.API, self._nodes, self._items, self._sources, self._groups, self._states
        self._trade = _compiled(*self.arguments)

    def begin(self, epoch: int, step: int) -> None:
        """The exchanges that follow belong to this step."""
        self._epoch, self._step = epoch, step
        self._state["prefix_bytes"] = self._prefix.write(wire.unchecked(wire.Part(epoch, step, 0))[:-1])
        self._state["round"] = 0
        self._nodes["due"], self._nodes["missing"] = self._first_due, self._nodes["expects"]

    @property
    def is_clear(self) -> bool:
        """Whether the next exchange can begin without Python. Raises NodeLost."""
        self._require_links()
        return not self._mesh.has_early

    def exchange(self, x: int, stride: int, rows: int, nbytes: int, begun: bool = False) -> None:
        """Turns this node's parts, float32 rows at an address, of so many bytes as they travel, into the sums. Raises
        NodeLost.

        begun: whether compiled code has begun it, and has stopped in the middle
        """
        start, before = time.perf_counter_ns(), int(self._state["spent_ns"])
        try:
            self._exchange(x, stride, rows, nbytes, int(self._state["stop"]) if begun else 0)
        finally:
            self._state["spent_ns"] = before + time.perf_counter_ns() - start
            self._count()

    def _exchange(self, x: int, stride: int, rows: int, nbytes: int, stop: int) -> None:
        rounds = len(self._groups) - 1
        first, deadline = int(self._state["round"]) % rounds, None
        talked_until = time.monotonic() + WAIT_MS / 1e3
        while first < rounds:
            if stop == FAILED:
                self._post_rest(first, nbytes)
            elif stop == OTHER:
                owner = self._owners[self._state["item"]]
                received = owner.understand(self._frames.first(self._state["count"]))
                if received:
                    self._mesh.hear(received)
                if time.monotonic() > talked_until:  # so much is said that nobody is ever late
                    deadline = self._mesh.wait(self._missing(first), deadline, blocks=False)
            elif stop:
                deadline = self._mesh.wait(self._missing(first), deadline)
            self._require_links()
            until = first + 1 if self._mesh.has_early and self._take_early(nbytes) else rounds
            place = first, until, stop != 0, x, stride, rows, self._columns, nbytes
            stop = self._trade(*self.arguments, *place)
            before, first = first, int(self._state["round"]) % rounds if stop else until
            deadline = deadline if first == before else None

    def end(self) -> float:
        """The step is over: the seconds that its exchanges took."""
        self._count()
        seconds, self._state["spent_ns"] = int(self._state["spent_ns"]) / 1e9, 0
        return seconds

    def _count(self) -> None:
        self._mesh.sent_bytes += int(self._state["sent"])
        self._mesh.received_bytes += int(self._state["received"])
        self._state["sent"] = self._state["received"] = 0

    def _require_links(self) -> None:
        """Raises NodeLost where one of the links is lost: its socket may be closed."""
        if any(endpoint.lost for endpoint in self._endpoints):
            self._mesh.post(self._numbers, wire.encode(wire.Beat()))

    def _take_early(self, nbytes: int) -> bool:
        """Takes what the mesh has put aside and is due; whether there may be more. Raises NodeLost."""
        for place, node in zip(self._nodes, self._numbers, strict=True):
            if place["missing"]:
                payload = self._mesh.early(node, self._header_of(place["due"]))
                if payload is not None:
                    if len(payload) != nbytes:
                        raise NodeLost(node, f"it sends a part of {len(payload)} bytes, and {nbytes} are due")
                    self._slots[node][:nbytes] = np.frombuffer(payload, np.uint8)
                    place["missing"] = 0
        return self._mesh.has_early

    def _post_rest(self, group: int, nbytes: int) -> None:
        """Sends the part to those of a group that have not got it. Raises NodeLost."""
        header = self._header_of(self._state["round"])
        places = range(self._state["count"], self._groups["nodes"][group + 1])
        rest = [self._numbers[i] for i in places if self._nodes["sends"][i]]
        self._mesh.post(rest, [header, self._own[:nbytes].tobytes()])

    def _header_of(self, round: int) -> bytes:
        return wire.unchecked(wire.Part(self._epoch, self._step, int(round)))

    def _missing(self, group: int) -> list[int]:
        start, end = self._groups["nodes"][group : group + 2]
        return [self._numbers[i] for i in range(start, end) if self._nodes["missing"][i]]
