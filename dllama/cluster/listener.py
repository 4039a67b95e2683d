"""A worker's port: whoever has the cluster's key may connect to it."""

from __future__ import annotations

import errno
from collections.abc import Callable, Sequence

import zmq

from dllama.cluster import address, sockets
from dllama.cluster.admission import ZAP_DOMAIN, admit_only
from dllama.cluster.hub import Hub
from dllama.cluster.key import ClusterKey
from dllama.cluster.links import MAX_MESSAGE_BYTES, LinkLost
from dllama.errors import ClusterError

_contexts: set[zmq.Context] = set()
"""Of listeners that nobody has closed: one that is collected waits for its sockets, for ever if they come later."""

OTHER_KEY = "it has another cluster key"


class Listener:
    """Takes in nodes that connect to one port of this device; not for several threads.

    A connection without the key, of another program, or with messages that are too large is dropped: nothing of it
    arrives here, and everybody else is served as before.
    """

    def __init__(
        self,
        host: str,
        port: int,
        key: ClusterKey | None,
        max_message_bytes: int = MAX_MESSAGE_BYTES,
        log: Callable[[str], None] = lambda line: None,
    ):
        """host: an address of this device, "0.0.0.0" for all;  port: 0 for any free one;  key: None for no encryption

        log: is told, in a line, of connections that were turned away
        Raises ClusterError for a port in use and for what is no address of this device.
        """
        where = address.resolve(host, port, to_bind=True)
        self.up = True
        self.losses: list[LinkLost] = []  # for the hub
        self._log = log
        self._fault: str | None = None  # of the connection that is about to be dropped
        self._peers: dict[bytes, Peer] = {}
        self._connected: dict[int, Peer | None] = {}  # by the connection's file descriptor
        self._context = zmq.Context()
        _contexts.add(self._context)
        self._admission = admit_only(key, self._context) if key else None
        self.socket = sockets.new_socket(self._context, zmq.ROUTER, max_message_bytes)
        self.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if key:
            sockets.use_key(self.socket, key)
            self.socket.setsockopt(zmq.CURVE_SERVER, 1)
            self.socket.setsockopt(zmq.ZAP_DOMAIN, ZAP_DOMAIN)
            self.socket.setsockopt(zmq.ZAP_ENFORCE_DOMAIN, 1)  # where nobody answers, nobody gets in
        watched = zmq.EVENT_ACCEPTED | zmq.EVENT_DISCONNECTED
        watched |= zmq.EVENT_HANDSHAKE_FAILED_PROTOCOL | zmq.EVENT_HANDSHAKE_FAILED_AUTH
        watched |= zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL
        self.monitor = sockets.new_monitor(self.socket, watched)
        try:
            self.socket.bind(f"tcp://{where}")
        except zmq.ZMQError as error:
            self.close()
            raise ClusterError(_why_not(where, error)) from None
        self.port = int(self.socket.getsockopt(zmq.LAST_ENDPOINT).rstrip(b"\0").rpartition(b":")[2])

    def receive(self, timeout_ms: float | None = None) -> tuple[Peer, list] | None:
        """The next message and who sent it, or None when the time is over; as `Hub.receive`."""
        return Hub(self).receive(timeout_ms)

    def close(self) -> None:
        """Close it and all connections; what was not sent yet is dropped."""
        for peer in self._peers.values():
            peer.lost = peer.lost or "this side closed the link"
        sockets.close(self.socket, self.monitor)
        if self._admission:
            self._admission.stop()
        self._context.term()
        _contexts.discard(self._context)

    def __enter__(self) -> Listener:
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def take(self) -> tuple[Peer, list] | None:
        """For the hub: a message that is there already."""
        try:
            return self.understand(sockets.receive(self.socket))
        except zmq.Again:
            return None

    def understand(self, frames: Sequence[zmq.Frame]) -> tuple[Peer, list] | None:
        """What has come on the socket as the hub returns it."""
        first, *frames = frames
        routing_id = first.bytes
        peer = self._peers.get(routing_id) or self._new_peer(routing_id, frames[0])
        return (peer, list(map(sockets.content, frames))) if peer else None

    def next_loss(self) -> LinkLost:
        """For the hub: the first of the losses, when no message is there any more. The peer is known until then, as
        what is left of its messages must not be taken for those of the next connection of the same descriptor."""
        loss = self.losses.pop(0)
        del self._peers[loss.source.routing_id]
        return loss

    def watch(self) -> None:
        """For the hub: look what the monitor tells."""
        for event, value in sockets.events(self.monitor):
            if event == zmq.EVENT_ACCEPTED:
                self._connected[value] = None
            elif event == zmq.EVENT_DISCONNECTED:
                peer = self._connected.pop(value, None)
                self._forget(peer)
                if not peer:
                    self._log(f"a connection was dropped: {self._fault or 'it is no dllama node'}")
                self._fault = None
            else:  # always right before EVENT_DISCONNECTED of the same connection
                self._fault = _fault(event, value)

    def _new_peer(self, routing_id: bytes, frame: zmq.Frame) -> Peer | None:
        """Get to know who sent its first message; None for one that went without ZeroMQ's handshake, or around ours."""
        try:
            descriptor = frame.get(zmq.SRCFD)
        except zmq.ZMQError:
            return None
        if routing_id[:1] != b"\0":  # a name of its own choice
            return None
        self.watch()  # what happened to an earlier connection of this descriptor
        peer = self._peers[routing_id] = Peer(self, routing_id, frame.get("Peer-Address").removeprefix("::ffff:"))
        if descriptor not in self._connected:
            self._forget(peer)
            return peer
        self._forget(self._connected[descriptor])
        self._connected[descriptor] = peer
        return peer

    def _forget(self, peer: Peer | None) -> None:
        if peer:
            peer.lost = peer.lost or "the connection broke"
            self.losses.append(LinkLost(peer, peer.lost))


class Peer:
    """A node that has connected to a Listener and sent something."""

    def __init__(self, listener: Listener, routing_id: bytes, name: str):
        self.name = name  # its IP address
        self.routing_id = routing_id  # the listener's own name for this connection
        self.lost: str | None = None  # why it cannot be used any more
        self.owner = listener  # whose socket it is

    def send(self, frames: Sequence) -> None:
        """Send a message, as `Link.send`. Raises LinkLost where the node is gone, or its queue full."""
        if not self.lost:
            try:
                return sockets.send(self.owner.socket, [self.routing_id, *frames])
            except zmq.Again:
                self.lost = "it takes in nothing any more"
            except zmq.ZMQError as error:
                if error.errno != zmq.EHOSTUNREACH:
                    raise
                self.lost = "the connection broke"
        raise LinkLost(self, self.lost)


def _why_not(where: address.Address, error: zmq.ZMQError) -> str:
    if error.errno == zmq.EADDRINUSE:
        return f"port {where.port} is in use, perhaps by another worker; choose another with --port"
    if error.errno in (zmq.EADDRNOTAVAIL, errno.ENODEV):
        return f"{where.host} is no address of this device"
    return f"{where}: cannot listen there: {error.strerror.lower()}"


def _fault(event: int, value: int) -> str:
    if event == zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL:
        return "it ended before it said what it is"
    if event == zmq.EVENT_HANDSHAKE_FAILED_AUTH:
        return OTHER_KEY
    return {
        zmq.PROTOCOL_ERROR_ZMTP_MECHANISM_MISMATCH: "either it or this worker was started with --insecure",
        zmq.PROTOCOL_ERROR_ZMTP_CRYPTOGRAPHIC: OTHER_KEY,
    }.get(value, "it is no dllama node")
