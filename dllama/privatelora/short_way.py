"""The way of one edge, or of several together, from stop to stop, where Python takes no part in what is said: see
`dllama.kernels.talk`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from dllama.cluster import hub
from dllama.cluster.listener import Peer
from dllama.engine.weights import padded
from dllama.formats import FloatType
from dllama.kernels import libzmq, tags
from dllama.kernels.talk import ANSWERED, EDGE, FORMS, STOP, TALK, UNFIT
from dllama.privatelora.headers import Headers
from dllama.privatelora.passage import PRODUCTS, Stop
from dllama.privatelora.shape import AdapterShape

SHORT_ROWS = 16
"""Of all edges that may take it together. A pass of more rows takes long, and is worked in a thread of its own."""
SECONDS = 0.25
"""After that the cloud looks round for others."""


class EdgeTalk:
    """What compiled code has to know of an edge.

    stops: all that it has;  shape: its adapter's;  form: in which its values travel
    """

    def __init__(self, stops: Sequence[Stop], shape: AdapterShape, form: FloatType, peer: Peer):
        self.stops, self.shape, self.peer = list(stops), shape, peer
        self.path = tuple(self.stops), tuple(shape.targets)  # edges go together if they have the same
        self._id = np.frombuffer(peer.routing_id, np.uint8)
        self._headers = Headers()
        self.record = np.zeros(1, EDGE)
        values = {
            "form": FORMS.index(tags.BY_NAME[form.name.lower()]),
            "r_c2d": shape.r_c2d,
            "r_d2c": shape.r_d2c,
            "id": self._id.ctypes.data,
            "id_bytes": len(self._id),
            "low": self._headers.low.address,
            "answer": self._headers.answer.address,
        }
        for name, value in values.items():
            self.record[name] = value

    def begin(self, step: int, rows: int) -> None:
        """Some rows of a step are about to go on."""
        self._headers.begin(self.record, step)
        self.record["rows"] = rows


class ShortWay:
    """Past the stops of some edges with one path, as long as nothing else happens; they have at most SHORT_ROWS rows.

    blocks: whether the thread may sleep while it waits for an answer, since no other of the team waits with it
    """

    def __init__(self, edges: Sequence[EdgeTalk], blocks: bool):
        first = edges[0]
        self.stops, (_, targets) = first.stops, first.path
        picked = [[i for i, target in enumerate(names) if target in targets] for names in PRODUCTS]
        starts = np.cumsum([0, *map(len, picked)])
        of_product = [(int(start), len(each)) for start, each in zip(starts, picked, strict=False)]
        records = [(stop.half, *stop, *of_product[stop.product]) for stop in self.stops]
        self._frames, self._talks = libzmq.Frames(), np.zeros(1, TALK)
        self._talk = talk = self._talks[0]
        talk["socket"], talk["frames"] = first.peer.owner.socket.underlying, self._frames.place
        talk["clock"], talk["spin_ns"], talk["blocks"] = time.CLOCK_MONOTONIC, int(1e9 * hub.SPIN_SECONDS), blocks
        self._edges, self._records = list(edges), np.zeros(len(edges), EDGE)
        ranks = [rank for edge in edges for rank in (edge.shape.r_c2d, edge.shape.r_d2c)]
        width = padded(max(map(len, picked)) * max(ranks))
        room, out = np.zeros(width, np.float32), np.zeros(4 * width * SHORT_ROWS, np.uint8)
        numbers = np.array([i for product in picked for i in product], np.int64)
        self._before = libzmq.API, np.array(records, STOP), self._talks, self._records, numbers
        self._behind = room, out

    def arguments(self, low: np.ndarray) -> tuple:
        """Those of `talk_at`. ``low``: float32 [rows, targets, ranks], A·x and where answers are put"""
        return *self._before, low, *self._behind

    def begin(self, passed: int, patience: float) -> None:
        """Behind so many stops; ``patience``: seconds that edges wait for each other at each."""
        talk = self._talk
        for i, edge in enumerate(self._edges):
            self._records[i] = edge.record[0]
        self._records["first_row"] = np.cumsum(self._records["rows"]) - self._records["rows"]
        self._records["state"] = ANSWERED
        talk["told"], talk["count"], talk["waited_ns"] = passed - 1, 0, 0
        talk["patience_ns"] = int(1e9 * patience)
        talk["until_ns"] = time.monotonic_ns() + int(1e9 * SECONDS)

    @property
    def ahead(self) -> list[Stop]:
        """The stops that are still to come."""
        return self.stops[self.passed :]

    @property
    def passed(self) -> int:
        """Stops that A·x has been sent at."""
        return int(self._talk["told"]) + 1

    @property
    def at(self) -> Stop:
        """The last of these."""
        return self.stops[int(self._talk["told"])]

    @property
    def waited(self) -> float:
        """Seconds that answers have been waited for."""
        return int(self._talk["waited_ns"]) / 1e9

    @property
    def answered(self) -> list[bool]:
        """Of each edge: whether its answer for that stop is there."""
        return [state == ANSWERED for state in self._records["state"]]

    @property
    def unfit(self) -> list[bool]:
        """Of each edge: whether its A·x could not be sent."""
        return [state == UNFIT for state in self._records["state"]]

    @property
    def other(self) -> list[libzmq.Frame] | None:
        """The message that has ended the way: it is none of the answers, or not fit to be one."""
        return self._frames.first(int(self._talk["count"])) if self._talk["count"] else None
