"""Waiting for messages on all of a node's links at once."""

from __future__ import annotations

import math
import os
import time
from typing import TYPE_CHECKING

import zmq

from dllama.kernels.team import usable_cpus

if TYPE_CHECKING:
    from dllama.cluster.links import Link
    from dllama.cluster.listener import Listener, Peer

CONNECTING_SECONDS = 0.1
"""How often links that are not up yet are looked after."""

SPIN_SECONDS = 0.0 if usable_cpus() == 1 else 200e-6 if usable_cpus() < 8 else 1e-3
"""How long to ask again and again for a message that is on its way: longer than it takes, short against what a step
takes where nodes do not keep pace. Not where the only CPU is needed to bring it; and longer where many are idle."""


class Hub:
    """Receives from several links, and from the peers of a listener. This is the path of every exchange.

    One call of the system tells which sockets have something, monitors included, so that a lost link is noticed while
    others are busy; each of them then gets its turn before the next.
    """

    def __init__(self, *sources: Link | Listener):
        self._sources = list(sources)
        self._ready: list[Link | Listener] = []  # those that have something and had no turn yet
        self._usual_wait = 0.0  # seconds; see `receive_soon`
        self._build()

    def add(self, source: Link | Listener) -> None:
        """Receive from this one too."""
        self._sources.append(source)
        self._build()

    def remove(self, source: Link | Listener) -> None:
        """Receive no more from this one."""
        self._sources.remove(source)
        self._build()

    def receive_soon(self) -> tuple[Link | Peer, list] | None:
        """The next message, as `receive`, if it comes within SPIN_SECONDS; it raises nothing.

        It asks again and again and offers the CPU to ZeroMQ's own threads in between: on a fast network the answer is
        on its way, and to be woken up for it takes as long as it takes itself. Where messages usually take longer it
        does not even begin, and leaves the CPU to whoever can use it; ``waited`` tells it.
        """
        if self._usual_wait >= SPIN_SECONDS:
            return None
        start = time.perf_counter()
        while True:
            for source in self._sources:
                if not source.socket.closed and source.socket.getsockopt(zmq.EVENTS) & zmq.POLLIN:
                    message = source.take()
                    if message:
                        self.waited(time.perf_counter() - start)
                        return message
            if time.perf_counter() > start + SPIN_SECONDS:
                return None
            os.sched_yield()

    def waited(self, seconds: float) -> None:
        """Notes how long a message took that `receive_soon` could have waited for."""
        self._usual_wait += (seconds - self._usual_wait) / 16

    def receive(self, timeout_ms: float | None = None) -> tuple[Link | Peer, list] | None:
        """The next message: who sent it and its frames, small ones as bytes and large ones as memoryviews.

        None when the time is over; without a timeout it waits for ever. Raises LinkLost, once, for each link and peer
        that is lost, after the messages that came before; a link is closed and removed then.
        """
        end = None if timeout_ms is None else time.monotonic() + timeout_ms / 1000
        while True:
            while self._ready:
                source = self._ready.pop()
                message = None if source.socket.closed else source.take()
                if message:
                    return message
            message = self._lost_ones()
            if message:
                return message
            left = None if end is None else max(0, end - time.monotonic())
            if not self._wait(left) and left is not None and time.monotonic() >= end:
                return None

    def _wait(self, seconds: float | None) -> bool:
        """Wait until something happens, or for so long; links that are not up yet may end it sooner."""
        connecting = [source for source in self._sources if not source.up]
        if connecting and (seconds is None or seconds > CONNECTING_SECONDS):
            seconds = CONNECTING_SECONDS
        happened = self._poller.poll(None if seconds is None else math.ceil(1000 * seconds))
        for socket, _ in happened:
            source = self._monitored.get(socket)
            if source:
                source.watch()
            else:
                self._ready.append(self._receiving[socket])
        for link in connecting:
            if not link.up and time.monotonic() > link.deadline:
                link.give_up()
        return bool(happened)

    def _lost_ones(self) -> tuple[Link | Peer, list] | None:
        """Raise LinkLost for what has been lost; but what arrived before is returned first."""
        for source in list(self._sources):
            if source.socket.closed:
                self.remove(source)
            elif source.losses:
                message = source.take()
                if message:
                    return message
                loss = source.next_loss()
                if loss.source is source:
                    source.close()
                    self.remove(source)
                try:
                    raise loss
                finally:
                    del loss  # or it would keep alive all frames that it passes through, and what they hold
        return None

    def _build(self) -> None:
        self._receiving = {source.socket: source for source in self._sources}
        self._monitored = {source.monitor: source for source in self._sources}
        self._ready = [source for source in self._ready if source in self._sources]
        self._poller = zmq.Poller()
        for socket in (*self._receiving, *self._monitored):
            self._poller.register(socket, zmq.POLLIN)
