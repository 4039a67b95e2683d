"""The exchange after a segment: every node ends up with the sums of all nodes' parts.

The sums are the same bits on every node: parts are added in the same order, and what is rounded to travel is rounded
for its sender too.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from dllama.cluster import direct, wire
from dllama.cluster.direct import Direct
from dllama.cluster.mesh import Mesh, NodeLost
from dllama.cluster.rounds import Form, Meeting, meetings
from dllama.cluster.traffic import vector_bytes
from dllama.engine.forward import Exchange
from dllama.formats import FloatType
from dllama.kernels import tags
from dllama.kernels.jit import compiled
from dllama.kernels.travel import decode_sum, encode


class AllReduce(Exchange):
    """Sums rows of the residual stream over all nodes, in the plan's form.

    ``index``: this node's number; ``sums``: for each node the values that it sums in a reduce-scatter, all of them
    together [0, dim); ``form``, ``order``: as of `meetings`; ``rows``: the most rows of a step.
    """

    def __init__(
        self,
        mesh: Mesh,
        index: int,
        sums: Sequence[range],
        form: Form,
        order: Sequence[int],
        buffer_type: FloatType,
        epoch: int,
        rows: int,
    ):
        self._mesh, self._index, self._form, self._epoch, self._sums = mesh, index, form, epoch, sums
        self._type, self._tag = buffer_type, tags.BY_NAME[buffer_type.name.lower()]
        self._dim = sums[-1].stop
        self._nodes = range(len(sums))
        self._slots = np.zeros((len(sums) + 1, rows * vector_bytes(self._dim, buffer_type)), np.uint8)
        self._views = [memoryview(slot) for slot in self._slots]
        self._places = [slot.ctypes.data for slot in self._slots]
        self._sources = np.array(self._places[:-1])  # a slot for each node's part, and one to send from
        self._meetings = [] if form is Form.SCATTER else meetings(form, order, index)
        self._direct = None
        if direct.serves(form):
            self._direct = Direct(mesh, self._meetings, index, self._slots, self._dim, self._tag)
        self._step = self._round = 0
        self._seconds = 0.0
        self._encode_rows = compiled(encode, self._tag, 0, 0, 0, 0, 0)
        self._decode_sum = compiled(decode_sum, self._tag, self._sources, 0, 0, 0, 0)

    def begin(self, step: int) -> None:
        """The exchanges that follow belong to this step."""
        self._step, self._round = step, 0
        if self._direct:
            self._direct.begin(self._epoch, step)

    def __call__(self, x: int, stride: int, rows: int) -> None:
        """Turns this node's parts, float32 [rows, dim] at an address, into the sums. Raises NodeLost."""
        if self._direct:
            self._direct.exchange(x, stride, rows, self._nbytes(rows, range(self._dim)))
            return
        start = time.perf_counter()
        if self._form is Form.SCATTER:
            self._reduce_scatter(x, stride, rows)
            self._all_gather(x, stride, rows)
        else:
            for meeting in self._meetings:
                self._meet(x, stride, rows, meeting)
        self._seconds += time.perf_counter() - start

    @property
    def short_cut(self) -> tuple | None:
        return self._direct and self._direct.arguments

    def part_bytes(self, rows: int) -> int:
        """Raises NodeLost."""
        return self._nbytes(rows, range(self._dim)) if self._direct and self._direct.is_clear else 0

    def go_on(self, x: int, stride: int, rows: int) -> None:
        """Raises NodeLost."""
        self._direct.exchange(x, stride, rows, self._nbytes(rows, range(self._dim)), begun=True)

    def end(self) -> float:
        """The step is over: the seconds that its exchanges took."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds + (self._direct.end() if self._direct else 0.0)

    def _meet(self, x: int, stride: int, rows: int, meeting: Meeting) -> None:
        everything = range(self._dim)
        self._encode(x, stride, rows, everything, self._index)
        self._send(self._index, rows, everything, meeting.to)
        self._collect(dict.fromkeys(meeting.of, everything), rows)
        if meeting.summed:
            self._decode_sum(self._tag, self._sources[list(meeting.summed)], x, stride, rows, self._dim)
        self._round += 1

    def _reduce_scatter(self, x: int, stride: int, rows: int) -> None:
        own, spare = self._sums[self._index], len(self._nodes)
        for node in self._others(self._nodes):
            self._encode(x, stride, rows, self._sums[node], spare)
            self._send(spare, rows, self._sums[node], [node])
        if own:
            self._encode(x, stride, rows, own, self._index)
            self._collect({node: own for node in self._others(self._nodes)}, rows)
            self._decode_sum(self._tag, self._sources, x + 4 * own.start, stride, rows, len(own))
        self._round += 1

    def _all_gather(self, x: int, stride: int, rows: int) -> None:
        owners = [node for node in self._nodes if self._sums[node]]
        self._encode(x, stride, rows, self._sums[self._index], self._index)
        self._send(self._index, rows, self._sums[self._index], self._others(self._nodes))
        self._collect({node: self._sums[node] for node in self._others(owners)}, rows)
        for node in owners:
            span = self._sums[node]
            self._decode_sum(self._tag, self._sources[node : node + 1], x + 4 * span.start, stride, rows, len(span))
        self._round += 1

    def _others(self, nodes: Sequence[int]) -> list[int]:
        return [node for node in nodes if node != self._index]

    def _nbytes(self, rows: int, columns: range) -> int:
        return rows * vector_bytes(len(columns), self._type)

    def _encode(self, x: int, stride: int, rows: int, columns: range, slot: int) -> None:
        self._encode_rows(self._tag, x + 4 * columns.start, stride, rows, len(columns), self._places[slot])

    def _send(self, slot: int, rows: int, columns: range, nodes: Sequence[int]) -> None:
        """What a slot holds, to some nodes; nothing to say needs no message."""
        if columns:
            payload = bytes(self._views[slot][: self._nbytes(rows, columns)])  # the slot's next use may be sooner
            self._mesh.post(nodes, [self._header(), payload])

    def _collect(self, columns: dict[int, range], rows: int) -> None:
        """Waits for the parts of some nodes, of so many values each, into their slots."""

        def take(node: int, payload) -> None:
            expected = self._nbytes(rows, columns[node])
            if len(payload) != expected:
                raise NodeLost(node, f"it sends a part of {len(payload)} bytes, and {expected} are due")
            self._views[node][:expected] = payload

        self._mesh.collect_parts(self._header(), columns, take)

    def _header(self) -> bytes:
        return wire.unchecked(wire.Part(self._epoch, self._step, self._round))
