"""An edge's answers without Python: see `dllama.kernels.reply`."""

from __future__ import annotations

import time

import numpy as np

from dllama.cluster import hub, wire
from dllama.cluster.links import Link
from dllama.engine.workspace import MAX_ROWS
from dllama.kernels import libzmq
from dllama.kernels.jit import compiled
from dllama.kernels.reply import REPLY, example, reply
from dllama.kernels.tags import Tag
from dllama.privatelora.answers import Answers
from dllama.privatelora.passage import Stop

MAX_HEADER = 64


def prepare(form: Tag) -> None:
    """Compiles what an edge's answers in this form need: in the middle of a step the cloud would wait for that."""
    if libzmq.AVAILABLE:
        compiled(reply, form, *example())


class Replies:
    """Answers what the cloud at a link sends, for steps of at most MAX_ROWS rows; see ``AVAILABLE`` of `libzmq`."""

    def __init__(self, answers: Answers, link: Link):
        self._link, self._stops = link, answers.stops
        self._answers, self._frames = answers, libzmq.Frames()
        self._low, self._answer = (np.zeros(MAX_HEADER, np.uint8) for _ in range(2))
        self._states = np.zeros(1, REPLY)
        self._state = state = self._states[0]
        state["socket"], state["frames"] = link.socket.underlying, self._frames.place
        state["clock"], state["spin_ns"], state["blocks"] = time.CLOCK_MONOTONIC, int(1e9 * hub.SPIN_SECONDS), 1
        state["low"], state["answer"] = self._low.ctypes.data, self._answer.ctypes.data
        state["r_c2d"], state["r_d2c"] = answers.ranks
        state["x"], state["y"] = answers.buffers
        source, out = np.zeros(1, np.int64), np.zeros(MAX_ROWS * answers.most_bytes, np.uint8)
        self._arguments = answers.tag, libzmq.API, answers.records, self._states, source, out
        self._reply = compiled(reply, answers.tag, *example())
        self.waited = 0.0  # seconds, and bytes, since the step began
        self.sent = self.received = 0

    def begin(self, step: int, rows: int) -> None:
        """A step has been sent."""
        state = self._state
        for room, name, kind in ((self._low, "low_bytes", wire.Low), (self._answer, "answer_bytes", wire.Answer)):
            prefix = wire.unchecked(kind(step, 0, 0))[:-2]
            room[: len(prefix)] = np.frombuffer(prefix, np.uint8)
            state[name] = len(prefix)
        state["rows"], state["next"] = rows, 0 if rows <= MAX_ROWS else len(self._stops)
        state["waited_ns"] = state["sent"] = state["received"] = 0
        self.waited, self.sent, self.received = 0.0, 0, 0

    def answered(self, stop: Stop) -> None:
        """Somebody else has done that."""
        if self._state["rows"] <= MAX_ROWS:
            self._state["next"] = self._stops.index(stop) + 1

    def go(self) -> list | None:
        """Answers for a while: the frames of a message that is for others, None where there is none."""
        self._state["count"] = 0
        self._reply(*self._arguments)
        state = self._state
        self.waited = int(state["waited_ns"]) / 1e9
        self.sent, self.received = int(state["sent"]), int(state["received"])
        received = state["count"] and self._link.understand(self._frames.first(int(state["count"])))
        return received[1] if received else None
