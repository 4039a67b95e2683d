"""An edge's way from stop to stop without Python: see `dllama.kernels.talk`."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from dllama.cluster import hub, wire
from dllama.cluster.listener import Peer
from dllama.engine.weights import padded
from dllama.formats import FloatType
from dllama.kernels import libzmq, tags
from dllama.kernels.talk import DONE, FORMS, LONG, OTHER, STOP, TALK, UNFIT
from dllama.privatelora.passage import PRODUCTS, Stop
from dllama.privatelora.shape import AdapterShape

SHORT_ROWS = 16
"""Rows of a step that may take it. A pass of more rows takes long, and is worked in a thread of its own."""
SECONDS = 0.25
"""After that the cloud looks round for others."""
MAX_HEADER = 64


class ShortWay:
    """Past the stops of one edge, as long as nothing else happens.

    low: float32 [rows, targets, ranks], what the backend has A·x and answers in;  blocks: whether the thread may sleep
    while it waits for an answer, since no other of the team waits for it

    arguments: those of `talk_at`
    """

    def __init__(
        self,
        stops: Sequence[Stop],
        shape: AdapterShape,
        form: FloatType,
        peer: Peer,
        low: np.ndarray,
        blocks: bool,
    ):
        self.stops, self.shape = list(stops), shape
        self.peer, self._id = peer, np.frombuffer(peer.routing_id, np.uint8)
        self._low, self._answer = (np.zeros(MAX_HEADER, np.uint8) for _ in range(2))
        self._frames = libzmq.Frames()
        picked = [[i for i, target in enumerate(names) if target in shape.targets] for names in PRODUCTS]
        starts = np.cumsum([0, *map(len, picked)])
        of_product = [(int(start), len(targets)) for start, targets in zip(starts, picked, strict=False)]
        records = [(8 * layer + 2 * product, layer, product, *of_product[product]) for layer, product in self.stops]
        self._talks = np.zeros(1, TALK)
        self._talk = talk = self._talks[0]
        talk["form"] = FORMS.index(tags.BY_NAME[form.name.lower()])
        talk["r_c2d"], talk["r_d2c"] = shape.r_c2d, shape.r_d2c
        talk["socket"], talk["frames"] = peer.owner.socket.underlying, self._frames.place
        talk["id"], talk["id_bytes"] = self._id.ctypes.data, len(self._id)
        talk["low"], talk["answer"] = self._low.ctypes.data, self._answer.ctypes.data
        talk["clock"], talk["spin_ns"], talk["blocks"] = time.CLOCK_MONOTONIC, int(1e9 * hub.SPIN_SECONDS), blocks
        width = padded(max(map(len, picked)) * max(shape.r_c2d, shape.r_d2c))
        room, out = np.zeros(width, np.float32), np.zeros(4 * width * SHORT_ROWS, np.uint8)
        numbers = np.array([i for product in picked for i in product], np.int64)
        self.arguments = libzmq.API, np.array(records, STOP), self._talks, numbers, low, room, out

    def begin(self, step: int, rows: int, passed: int) -> None:
        """Before some rows of a step go on, so many stops being behind them."""
        talk = self._talk
        for room, name, kind in ((self._low, "low", wire.Low), (self._answer, "answer", wire.Answer)):
            prefix = wire.unchecked(kind(step, 0, 0))[:-2]
            room[: len(prefix)] = np.frombuffer(prefix, np.uint8)
            talk[f"{name}_bytes"] = len(prefix)
        talk["rows"], talk["next"], talk["stop"], talk["waited_ns"] = rows, passed, LONG, 0
        talk["until_ns"] = time.monotonic_ns() + int(1e9 * SECONDS)

    @property
    def is_open(self) -> bool:
        """Whether the edge is still there."""
        return not self.peer.lost

    @property
    def passed(self) -> int:
        """Stops that A·x has been sent at."""
        return int(self._talk["next"]) + (not self.answered and self.is_fit)

    @property
    def waited(self) -> float:
        """Seconds that answers have been waited for."""
        return int(self._talk["waited_ns"]) / 1e9

    @property
    def at(self) -> Stop:
        """The last stop that it has come to."""
        return self.stops[int(self._talk["next"]) - self.answered]

    @property
    def answered(self) -> bool:
        """Whether the answer of that stop is there."""
        return self._talk["stop"] in (DONE, LONG)

    @property
    def is_fit(self) -> bool:
        """Whether A·x of that stop could be sent."""
        return self._talk["stop"] != UNFIT

    def other(self) -> list[libzmq.Frame] | None:
        """The message that came in place of the answer, or as one that is not fit."""
        return self._frames.first(int(self._talk["count"])) if self._talk["stop"] == OTHER else None
