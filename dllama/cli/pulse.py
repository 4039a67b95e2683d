"""Whether a node still goes round, as its hub sees it."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress

import zmq


class Pulse:
    """A source for a node's hub: calls ``beat`` about every so many seconds, but only while the hub is listened to.

    A thread sends the hub a message each time, and the beat is what the hub does with it: a node that hangs, be it in a
    lock or in compiled code, has no pulse.
    """

    up = True  # what follows is what the hub wants to see of a source

    def __init__(self, beat: Callable[[], None], seconds: float):
        self.losses: list = []
        self._beat, self._seconds = beat, seconds
        context = zmq.Context.instance()
        self.socket, self.monitor, self._sender = (context.socket(zmq.PAIR) for _ in range(3))
        for one in (self.socket, self.monitor, self._sender):
            one.setsockopt(zmq.LINGER, 0)
            one.setsockopt(zmq.SNDHWM, 1)
            one.setsockopt(zmq.RCVHWM, 1)
        self.socket.bind(f"inproc://pulse-{id(self)}")
        self._sender.connect(f"inproc://pulse-{id(self)}")
        threading.Thread(target=self._send, name="dllama-pulse", daemon=True).start()

    def take(self) -> None:
        """For the hub: it has come to this source. No message for whoever waits."""
        with suppress(zmq.Again):
            self.socket.recv(zmq.NOBLOCK)
            self._beat()

    def watch(self) -> None:
        """For the hub: nothing happens to this source."""

    def _send(self) -> None:
        while True:
            time.sleep(self._seconds)
            with suppress(zmq.Again):  # nobody has taken the ones before
                self._sender.send(b"", zmq.NOBLOCK)
