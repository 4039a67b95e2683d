"""Links to other nodes, from the side that connects; ``listener`` has the other side.

A link between two nodes is a DEALER at the side that connects and the ROUTER of the side that listens. Messages are
lists of frames (see ``wire``); they are received from the hub.
"""

from __future__ import annotations

import errno
import time
from collections.abc import Sequence

import zmq

from dllama.cluster import address, sockets
from dllama.cluster.hub import Hub
from dllama.cluster.key import ClusterKey
from dllama.errors import ClusterError

CONNECT_SECONDS = 10.0
RETRY_MS = 100
HUNG_UP = (errno.EPIPE, errno.ECONNRESET)
MAX_MESSAGE_BYTES = 1 << 26


class LinkLost(ClusterError):
    """A Link, or a Listener's Peer, that cannot be used any more: ``source``, and the reason."""

    def __init__(self, source, reason: str):
        super().__init__(f"{source.name}: {reason}")
        self.source, self.reason = source, reason


class Link:
    """A link to the worker at one address.

    It connects by itself, trying again until the worker is up or ``connect_timeout`` is over; what is sent before goes
    out then. Once it has been lost it stays lost, and is closed: another Link may be made. Not for several threads.
    """

    routing_id = b""  # its messages go without

    def __init__(
        self,
        name: str,
        key: ClusterKey | None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        connect_timeout: float = CONNECT_SECONDS,
        program: str = "dllama worker",
    ):
        """name: the worker's address, HOST:PORT;  key: None for no encryption;  connect_timeout: seconds
        program: what should run there

        Raises ClusterError for what is no address and for an unknown host.
        """
        self.name = name
        self.up = False  # whether the worker has been reached
        self.lost: str | None = None  # why it cannot be used any more; found out by receiving or sending
        self.losses: list[LinkLost] = []  # for the hub
        self._secure = key is not None
        self._refused = self._timed_out = False
        self._address = address.resolve(*address.parse(name))
        self._connect_timeout, self._program = connect_timeout, program
        self.deadline = time.monotonic() + connect_timeout
        self.socket = sockets.new_socket(zmq.Context.instance(), zmq.DEALER, max_message_bytes)
        self.socket.setsockopt(zmq.RECONNECT_IVL, RETRY_MS)
        if key:
            sockets.use_key(self.socket, key)
            self.socket.setsockopt(zmq.CURVE_SERVERKEY, key.public)
        watched = zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        watched |= zmq.EVENT_CLOSED | zmq.EVENT_DISCONNECTED
        self.monitor = sockets.new_monitor(self.socket, watched)
        self.socket.connect(f"tcp://{self._address}")

    @property
    def owner(self) -> Link:
        """Whose socket it is."""
        return self

    def send(self, frames: Sequence) -> None:
        """Send a message. Frames from 64 KiB on are not copied: they must not change until they are sent.

        Raises LinkLost, also where the worker takes in nothing for so long that the queue is full.
        """
        if self.lost:
            raise LinkLost(self, self.lost)
        try:
            sockets.send(self.socket, frames)
        except zmq.Again:
            self.watch()  # a connection that has ended may have no queue
            self._lose("it takes in nothing any more")
            raise LinkLost(self, self.lost) from None

    def receive(self, timeout_ms: float | None = None) -> list | None:
        """The next message's frames, or None when the time is over; for a link without a hub. Raises LinkLost."""
        if self.socket.closed:
            raise LinkLost(self, self.lost)
        message = Hub(self).receive(timeout_ms)
        return message and message[1]

    def close(self) -> None:
        """Close it; what was not sent yet is dropped."""
        self.lost = self.lost or "this side closed the link"
        sockets.close(self.socket, self.monitor)

    def __enter__(self) -> Link:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def take(self) -> tuple[Link, list] | None:
        """For the hub: a message that is there already."""
        try:
            return self.understand(sockets.receive(self.socket))
        except zmq.Again:
            return None

    def understand(self, frames: Sequence[zmq.Frame]) -> tuple[Link, list] | None:
        """What has come on the socket as the hub returns it."""
        if not self.up:
            self.watch()
            if not self.up:  # no handshake: an older protocol of ZeroMQ, or what looks like it, is not for us
                return None
        return self, list(map(sockets.content, frames))

    def next_loss(self) -> LinkLost:
        """For the hub: the first of the losses."""
        return self.losses.pop(0)

    def watch(self) -> None:
        """For the hub: look what the monitor tells."""
        for event, value in sockets.events(self.monitor):
            if event == zmq.EVENT_HANDSHAKE_SUCCEEDED:
                self.up = True
            elif event == zmq.EVENT_CLOSED:
                self._refused = True
            elif event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:  # right before EVENT_DISCONNECTED
                self._timed_out = value not in HUNG_UP
            elif self.up:
                self._lose("the connection broke")
            else:
                reason = address.what_answers(self._address, self._secure, not self._timed_out)
                if reason:
                    self._lose(reason)

    def give_up(self) -> None:
        """For the hub: the time to connect is over."""
        late = f"no answer within {self._connect_timeout:g} s"
        self._lose(f"nothing listens there; is '{self._program}' running?" if self._refused else late)

    def _lose(self, reason: str) -> None:
        if not self.lost:
            self.lost = reason
            self.losses.append(LinkLost(self, reason))
