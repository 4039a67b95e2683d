"""A cable that can be cut: connections to a port, passed on to a worker's."""

import contextlib
import socket
import threading


class Forwarder:
    """Passes connections on to ``port`` of this machine. ``passed_bytes``: towards that port, so far."""

    def __init__(self, port: int):
        self.target = port
        self.passed_bytes = 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._connections: list[tuple[socket.socket, socket.socket]] = []
        self._refused_from = None  # the number of the first connection that is refused
        self._flowing = threading.Event()
        self._flowing.set()
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self._listener.getsockname()[1]}"

    def cut(self, first: int = 0) -> None:
        """Breaks all connections from the ``first`` one on, in the order in which they came, and lets no others come.
        A worker's first one is its root's, and the others are other workers'."""
        self._refused_from = first
        for pair in self._connections[first:]:
            _close(*pair)

    def freeze(self) -> None:
        """Passes nothing on any more, as a pulled plug: both sides still believe that they are connected."""
        self._flowing.clear()

    def mend(self) -> None:
        """As new: what was there is gone, and others may come."""
        self.cut()
        self._connections, self._refused_from = [], None
        self._flowing.set()

    def close(self) -> None:
        self.mend()
        self._listener.close()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # closed
            while True:
                near, _ = self._listener.accept()
                if self._refused_from is not None and len(self._connections) >= self._refused_from:
                    near.close()
                    continue
                try:
                    far = socket.create_connection(("127.0.0.1", self.target))
                except OSError:
                    near.close()
                    continue
                self._connections.append((near, far))
                for source, target in ((near, far), (far, near)):
                    threading.Thread(target=self._pass_on, args=(source, target, target is far), daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket, to_worker: bool) -> None:
        with contextlib.suppress(OSError):  # closed, on one side or by a cut
            target.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            while data := source.recv(1 << 16):
                self._flowing.wait()
                target.sendall(data)
                self.passed_bytes += len(data) if to_worker else 0
        _close(source, target)


def _close(*sockets: socket.socket) -> None:
    for one in sockets:
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
        one.close()
