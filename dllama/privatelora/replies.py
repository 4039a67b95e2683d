"""An edge's answers without Python: see `dllama.kernels.reply`."""

from __future__ import annotations

import time

import numpy as np

from dllama.cluster import hub
from dllama.cluster.links import Link
from dllama.engine.workspace import MAX_ROWS
from dllama.kernels import libzmq
from dllama.kernels.jit import compiled
from dllama.kernels.reply import REPLY, example, reply
from dllama.kernels.tags import Tag
from dllama.privatelora.answers import Answers
from dllama.privatelora.headers import Headers
from dllama.privatelora.passage import Stop


def prepare(form: Tag) -> None:
    """Compiles what an edge's answers in this form need: in the middle of a step the cloud would wait for that."""
    if libzmq.AVAILABLE:
        compiled(reply, form, *example())


class Replies:
    """Answers what the cloud at a link sends, for steps of at most MAX_ROWS rows; see ``AVAILABLE`` of `libzmq`."""

    def __init__(self, answers: Answers, link: Link):
        self._link, self._stops = link, answers.stops
        self._kept = answers  # whose memory the records point to
        self._headers, self._frames = Headers(), libzmq.Frames()
        self._states = np.zeros(1, REPLY)
        self._state = state = self._states[0]
        state["socket"], state["frames"] = link.socket.underlying, self._frames.place
        state["clock"], state["spin_ns"], state["blocks"] = time.CLOCK_MONOTONIC, int(1e9 * hub.SPIN_SECONDS), 1
        state["low"], state["answer"] = self._headers.low.address, self._headers.answer.address
        state["r_c2d"], state["r_d2c"] = answers.ranks
        state["x"], state["y"] = answers.buffers
        source, out = np.zeros(1, np.int64), np.zeros(MAX_ROWS * answers.most_bytes, np.uint8)
        self._arguments = answers.tag, libzmq.API, answers.records, self._states, source, out
        self._reply = compiled(reply, answers.tag, *example())

    def begin(self, step: int, rows: int) -> None:
        """A step has been sent."""
        state = self._state
        self._headers.begin(state, step)
        state["rows"], state["next"] = rows, 0 if rows <= MAX_ROWS else len(self._stops)

    def answered(self, stop: Stop) -> None:
        """Somebody else has done that."""
        if self._state["rows"] <= MAX_ROWS:
            self._state["next"] = self._stops.index(stop) + 1

    @property
    def waited(self) -> float:
        """Seconds that the last ``go`` has waited."""
        return int(self._state["waited_ns"]) / 1e9

    @property
    def traffic(self) -> tuple[int, int]:
        """Bytes that it has sent and received."""
        return int(self._state["sent"]), int(self._state["received"])

    def go(self) -> list | None:
        """Answers for a while: the frames of a message that is for others, None where there is none."""
        state = self._state
        state["count"] = state["waited_ns"] = state["sent"] = state["received"] = 0
        self._reply(*self._arguments)
        received = state["count"] and self._link.understand(self._frames.first(int(state["count"])))
        return received[1] if received else None
