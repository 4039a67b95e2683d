"""Nodes in processes of their own, for tests that kill and stop them.

``python -m tests.cluster.node_processes listen KEY_FILE`` prints its port and sends back whatever comes; ``... connect
ADDRESS KEY_FILE`` says hello and then nothing more. KEY_FILE "" is no encryption.
"""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from dllama.cluster import key
from dllama.cluster.links import Link
from dllama.cluster.listener import Listener

ROOT = Path(__file__).parents[2]


@contextmanager
def process(*args) -> Iterator[subprocess.Popen]:
    """One of the above, until it is no longer needed."""
    command = [sys.executable, "-m", "tests.cluster.node_processes", *map(str, args)]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as child:
        try:
            yield child
        finally:
            child.kill()


@contextmanager
def worker(key_file: str = "") -> Iterator[tuple[subprocess.Popen, str]]:
    """A process that listens, and its address."""
    with process("listen", key_file) as child:
        yield child, f"127.0.0.1:{int(child.stdout.readline())}"


def main(role: str, *args: str) -> None:
    *address, key_file = args
    secret = key.load(key_file) if key_file else None
    if role == "listen":
        with Listener("127.0.0.1", 0, secret) as listener:
            print(listener.port, flush=True)
            while True:
                peer, frames = listener.receive()
                peer.send(frames)
    with Link(*address, secret) as link:
        link.send([b"hello"])
        link.receive()


if __name__ == "__main__":
    main(*sys.argv[1:])
