"""What goes over a connection without encryption: every byte, and the messages in them."""

import contextlib
import socket
import threading

GREETING_BYTES = 64
MORE, LONG, COMMAND = 1, 2, 4


class Recorder:
    """Passes connections on to a port of this machine and keeps what goes there. ``streams``: of each connection."""

    def __init__(self, port: int):
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = f"127.0.0.1:{self._listener.getsockname()[1]}"
        self.streams: list[bytearray] = []
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                kept = bytearray()
                self.streams.append(kept)
                for source, target, keep in ((near, far, kept.extend), (far, near, lambda data: None)):
                    threading.Thread(target=_pass_on, args=(source, target, keep), daemon=True).start()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _pass_on(source: socket.socket, target: socket.socket, keep) -> None:
    with contextlib.suppress(OSError), source, target:
        target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        while data := source.recv(1 << 16):
            keep(data)
            target.sendall(data)
        target.shutdown(socket.SHUT_WR)


def messages(stream: bytes) -> list[list[bytes]]:
    """The messages in what one side has sent, as lists of frames (ZMTP 3: https://rfc.zeromq.org/spec/23/)."""
    assert stream[:1] == b"\xff" and stream[12:16] == b"NULL", "a greeting, and no encryption"
    found, frames, at = [], [], GREETING_BYTES
    while at < len(stream):
        flags = stream[at]
        width = 8 if flags & LONG else 1
        size = int.from_bytes(stream[at + 1 : at + 1 + width], "big")
        at += 1 + width
        frame = bytes(stream[at : at + size])
        at += size
        if flags & COMMAND:  # the handshake, and heartbeats
            continue
        frames.append(frame)
        if not flags & MORE:
            found.append(frames)
            frames = []
    assert at == len(stream) and not frames
    return found
