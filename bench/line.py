"""A slow line on this machine: connections passed on with a delay and a bandwidth each way.

    python -m bench.line TARGET --rtt 0.005 --up 60e6 --down 100e6

Prints the port it listens on. Each way is a queue: bytes leave at the line's rate, and arrive half a round trip later.
Delays are kept to some 20 µs: timers of its threads have no slack (prctl's PR_SET_TIMERSLACK), where the system has it.
"""

import argparse
import contextlib
import ctypes
import queue
import socket
import threading
import time

PR_SET_TIMERSLACK = 29
EARLY = 30e-6
"""A sleep ends so much before its time, and the rest is waited for."""


def pass_on(source: socket.socket, target: socket.socket, delay: float, bits_s: float | None) -> None:
    """Until one side closes. delay: seconds one way."""
    waiting: queue.SimpleQueue = queue.SimpleQueue()
    threading.Thread(target=_deliver, args=(waiting, target), daemon=True).start()
    free = 0.0  # when the line has sent what it was given
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            now = time.perf_counter()
            free = max(free, now) + (8 * len(data) / bits_s if bits_s else 0.0)
            waiting.put((free + delay, data))
    waiting.put((0.0, None))


def _deliver(waiting: queue.SimpleQueue, target: socket.socket) -> None:
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_TIMERSLACK, 1, 0, 0, 0)
    while True:
        due, data = waiting.get()
        if data is None:
            break
        left = due - time.perf_counter() - EARLY
        if left > 0:
            time.sleep(left)
        while time.perf_counter() < due:
            pass
        try:
            target.sendall(data)
        except OSError:
            break
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_RDWR)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=int, help="port on this machine")
    parser.add_argument("--rtt", type=float, default=0.0, help="seconds there and back")
    parser.add_argument("--up", type=float, help="bit/s towards the target")
    parser.add_argument("--down", type=float, help="bit/s back")
    options = parser.parse_args()
    listener = socket.create_server(("127.0.0.1", 0))
    print(listener.getsockname()[1], flush=True)
    while True:
        near, _ = listener.accept()
        far = socket.create_connection(("127.0.0.1", options.target))
        for each in (near, far):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for source, target, rate in ((near, far, options.up), (far, near, options.down)):
            threading.Thread(target=pass_on, args=(source, target, options.rtt / 2, rate), daemon=True).start()


if __name__ == "__main__":
    main()
