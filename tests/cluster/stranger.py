"""Somebody at a worker's port who says whatever they like."""

import time

import msgpack

from dllama.cluster import bounds, wire
from dllama.cluster.links import Link

SECONDS = 30.0


class Stranger:
    """A link to a worker, and none of the checks that nodes make before they send."""

    def __init__(self, address: str):
        self.link = Link(address, None)

    def __enter__(self):
        return self

    def __exit__(self, *_) -> None:
        self.link.close()

    def say(self, message, *payload) -> None:
        self.link.send([msgpack.packb([bounds.SCHEMA[type(message)].number, *message]), *payload])

    def hear(self, *kinds, seconds: float = SECONDS):
        """The next message of these kinds, None if there is none in time."""
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            frames = self.link.receive(1e3 * left)
            if frames and type(message := wire.decode(frames)[0]) in kinds:
                return message
        return None
