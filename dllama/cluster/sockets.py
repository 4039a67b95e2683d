"""What all of the cluster's sockets have in common: options, keys, monitors, and how frames go in and out.

Options are those of zmq_setsockopt(3), events those of zmq_socket_monitor(3).
"""

import struct
from collections.abc import Iterator, Sequence

import zmq

from dllama.cluster.key import ClusterKey
from dllama.kernels.trade import WAIT_MS

HEARTBEAT_MS = 1000
SILENCE_MS = 3000
"""After a ping and so much silence the other side is taken for dead: 4 s at most after its last sign."""

HANDSHAKE_MS = 3000
"""After that a connection on which nobody speaks ZeroMQ is dropped."""

LARGE = 1 << 16
"""Frames from so many bytes on are not copied; below, copying is cheaper than keeping account."""

MAX_FRAMES = 2
"""Of any message. One more is kept, so that too many are noticed; the others are dropped."""

NOBLOCK = int(zmq.NOBLOCK)  # plain numbers: the members of zmq's enums are slow to combine and to pass
MORE = int(zmq.NOBLOCK | zmq.SNDMORE)

OPTIONS = {
    zmq.LINGER: 0,
    zmq.HEARTBEAT_IVL: HEARTBEAT_MS,
    zmq.HEARTBEAT_TIMEOUT: SILENCE_MS,
    zmq.HEARTBEAT_TTL: SILENCE_MS,
    zmq.HANDSHAKE_IVL: HANDSHAKE_MS,
    zmq.TCP_KEEPALIVE: 1,
    zmq.IPV6: 1,
    zmq.RCVTIMEO: WAIT_MS,
}


def new_socket(context: zmq.Context, kind: int, max_message_bytes: int) -> zmq.Socket:
    """A socket with the options above that drops whoever sends a frame of more than ``max_message_bytes``."""
    socket = context.socket(kind)
    for option, value in OPTIONS.items():
        socket.setsockopt(option, value)
    socket.setsockopt(zmq.MAXMSGSIZE, max_message_bytes)
    return socket


def use_key(socket: zmq.Socket, key: ClusterKey) -> None:
    """Encrypt, and show this key to the other side."""
    socket.setsockopt(zmq.CURVE_PUBLICKEY, key.public)
    socket.setsockopt(zmq.CURVE_SECRETKEY, key.secret)


def new_monitor(socket: zmq.Socket, events: int) -> zmq.Socket:
    """A socket that tells of these events."""
    endpoint = f"inproc://monitor-{socket.underlying}"
    socket.monitor(endpoint, events)
    monitor = socket.context.socket(zmq.PAIR)
    # Without a limit: where one is reached, ZeroMQ's I/O thread waits until somebody reads.
    monitor.setsockopt(zmq.RCVHWM, 0)
    monitor.setsockopt(zmq.LINGER, 0)
    monitor.connect(endpoint)
    return monitor


def events(monitor: zmq.Socket) -> Iterator[tuple[int, int]]:
    """What has happened since the last call: (event, value)."""
    while monitor.getsockopt(zmq.EVENTS) & zmq.POLLIN:
        event, _ = monitor.recv_multipart()
        yield struct.unpack("=Hi", event)


def close(socket: zmq.Socket, monitor: zmq.Socket) -> None:
    """Close both; what was not sent yet is dropped."""
    if not socket.closed:
        socket.disable_monitor()
        monitor.close()
        socket.close()


def send(socket: zmq.Socket, frames: Sequence) -> None:
    """Send one message; zmq.Again where its queue is full. A frame not copied must not change until it is sent."""
    *first, last = frames
    for frame in first:
        socket.send(frame, MORE, copy=len(frame) < LARGE)
    socket.send(last, NOBLOCK, copy=len(last) < LARGE)


def receive(socket: zmq.Socket) -> list[zmq.Frame]:
    """One message, which has to be there already; zmq.Again where it is not."""
    frame = socket.recv(NOBLOCK, copy=False)
    frames = [frame]
    while frame.more:
        frame = socket.recv(NOBLOCK, copy=False)
        if len(frames) <= MAX_FRAMES + 1:  # a ROUTER's begin with the routing id
            frames.append(frame)
    return frames


def content(frame: zmq.Frame) -> bytes | memoryview:
    """What a frame holds: small ones as bytes, large ones where they are."""
    return frame.bytes if len(frame) < LARGE else frame.buffer
