"""Workers on this machine, for a try-out: started with a run and stopped at its end."""

import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import BinaryIO

from dllama.cluster import key as cluster_key
from dllama.cluster.key import ClusterKey
from dllama.cluster.settings import STEP_TIMEOUT, ClusterSettings
from dllama.engine.memory import available_bytes
from dllama.errors import ClusterError

START_SECONDS = 120.0
"""A worker that does not listen by then never will; the first start on a machine compiles."""

HOST = "127.0.0.1"


@dataclass
class LocalWorker:
    """A worker's process, our end of the pipe that holds it, and what it logs."""

    process: subprocess.Popen
    pipe: socket.socket
    log: BinaryIO
    port: int = 0

    @property
    def address(self) -> str:
        return f"{HOST}:{self.port}"

    def last_words(self) -> str:
        """How it ended, for people."""
        status = self.process.returncode
        if status < 0:
            return f"was ended by {signal.Signals(-status).name}"
        self.log.seek(0)
        lines = self.log.read().decode(errors="replace").split("\n")
        said = next((line for line in reversed(lines) if line.strip()), "")
        return f"ended with exit status {status}: {said.removeprefix('dllama: error: ')}"


@contextmanager
def local_workers(
    count: int,
    nthreads: int,
    *,
    secure: bool = True,
    ratios: tuple[float, ...] | None = None,
    step_timeout: float = STEP_TIMEOUT,
    notify: Callable[[str], None] = lambda line: None,
) -> Iterator[ClusterSettings]:
    """Start so many workers of ``nthreads`` threads, and yield the settings to use them with; stop them at the end.

    They have a key of their own, unless not ``secure``, equal parts of the free memory, and equal shares unless there
    are ``ratios``. None of them outlives this process, however that ends. ``notify``: told of workers that ended early.

    Raises ClusterError where one cannot be started.
    """
    free = available_bytes()
    options = [] if free is None else ["--memory", f"{free // (count + 1)}b"]
    options += ["--nthreads", str(nthreads)]
    with _all_started(count, secure, options, notify) as (addresses, key):
        yield ClusterSettings(addresses, key, ratios or (1.0,) * (count + 1), step_timeout=step_timeout)


@contextmanager
def local_cloud(
    model: str | os.PathLike,
    nthreads: int,
    *,
    options: Sequence[str] = (),
    secure: bool = True,
    step_timeout: float = STEP_TIMEOUT,
    notify: Callable[[str], None] = lambda line: None,
) -> Iterator[ClusterSettings]:
    """As ``local_workers``, one that is the cloud of PrivateLoRA's edges, with a model's file, on the CPU unless the
    ``options`` say otherwise."""
    command = ["--device", "cpu", "--model", os.fspath(model), "--nthreads", str(nthreads), *options]
    with _all_started(1, secure, command, notify) as (addresses, key):
        yield ClusterSettings(addresses, key, step_timeout=step_timeout)


@contextmanager
def _all_started(
    count: int, secure: bool, options: list[str], notify: Callable[[str], None]
) -> Iterator[tuple[tuple[str, ...], ClusterKey | None]]:
    """So many workers that listen: their addresses, and their key."""
    key = cluster_key.generate() if secure else None
    with ExitStack() as stack:
        workers = [stack.enter_context(_started(key, options, notify)) for _ in range(count)]
        deadline = time.monotonic() + START_SECONDS
        for worker in workers:
            worker.port = _port(worker, deadline)
        yield tuple(worker.address for worker in workers), key


@contextmanager
def _started(key: ClusterKey | None, options: list[str], notify: Callable[[str], None]) -> Iterator[LocalWorker]:
    """A worker's process that ends with the block, at the latest."""
    ours, theirs = socket.socketpair()
    with ours, tempfile.TemporaryFile() as log, tempfile.TemporaryFile() as key_file:
        with theirs:
            command = [sys.executable, "-m", "dllama", "worker", "--host", HOST, "--port", "0", *options]
            command += ["--parent-fd", str(theirs.fileno())]
            if key is None:
                command += ["--insecure"]
            else:  # in a file without a name, so that nothing is left of it
                key_file.write(key.text.encode())
                key_file.seek(0)
                command += ["--key-file", f"/dev/fd/{key_file.fileno()}"]
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=[theirs.fileno(), key_file.fileno()],
                start_new_session=True,  # Ctrl-C in the terminal is for the root
            )
        worker = LocalWorker(process, ours, log)
        try:
            yield worker
        finally:
            if process.poll() is not None and worker.port:
                notify(f"worker {worker.address} {worker.last_words()}")
            process.kill()
            process.wait()


def _port(worker: LocalWorker, deadline: float) -> int:
    """The port that a worker listens on, when it does. Raises ClusterError."""
    ready, _, _ = select.select([worker.pipe], [], [], max(0, deadline - time.monotonic()))
    if not ready:
        raise ClusterError(f"a local worker has not started within {START_SECONDS:g} s")
    told = worker.pipe.recv(16)
    if not told:
        worker.process.wait()
        raise ClusterError(f"a local worker cannot be started, it {worker.last_words()}")
    return int(told)
