"""Nodes in processes of their own, for tests that talk to them and break them."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.cluster import nodes
from tests.forks import FORKS

SECONDS = 60.0
"""How long a machine that does much else may take for what takes a moment."""
STEP_TIMEOUT = 4.0


class Process:
    """A process that runs one of `nodes`, and ends with this one. ``lines``: what it has said so far."""

    def __init__(self, run: Callable, *args, **options):
        self._run, self._args, self.options = run, args, options
        self.lines: list[str] = []
        self._start()

    def _start(self) -> None:
        ours, theirs = FORKS.Pipe(duplex=False)
        args = theirs, self._run, *self._args
        self.process = FORKS.Process(target=_run, args=args, kwargs=self.options, daemon=True)
        self.process.start()
        theirs.close()
        self.port = None
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()

    @property
    def address(self) -> str:
        eventually(lambda: self.port or not self.alive)
        assert self.port, f"it did not start: {self.lines}"
        return f"127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        return self.process.is_alive()

    def said(self, words: str, since: int = 0) -> None:
        """Waits until it says so, in a line after the first ``since`` ones."""
        eventually(lambda: any(words in line for line in self.lines[since:]), lambda: f"{words!r} not in {self.lines}")

    def kill(self) -> None:
        self.process.kill()
        self.process.join()

    def stop(self) -> None:
        """SIGSTOP: its connections stay, but it does nothing."""
        os.kill(self.process.pid, signal.SIGSTOP)

    def go_on(self) -> None:
        os.kill(self.process.pid, signal.SIGCONT)

    def close(self) -> None:
        self.kill()
        self._reader.join()

    def __enter__(self) -> "Process":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _read(self, ours) -> None:
        with ours, open(ours.fileno(), closefd=False) as output:
            for line in output:
                if self.port is None and line.strip().isdecimal():
                    self.port = int(line)
                else:
                    self.lines.append(line.rstrip("\n"))


def _run(output, run: Callable, *args, **options) -> None:
    """What the process does."""
    for descriptor in (1, 2):
        os.dup2(output.fileno(), descriptor)
    output.close()
    threading.Thread(target=_end_with_parent, daemon=True).start()
    run(*args, **options)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(0)


class WorkerProcess(Process):
    """A live worker. ``options``: those of `nodes.worker`."""

    def __init__(self, slices: Path, **options):
        super().__init__(nodes.worker, **{"cache": str(slices), **options})

    @property
    def rss(self) -> int:
        """Bytes of memory in use, mapped files included."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    def hang(self) -> None:
        """It does nothing any more, but its threads that keep the connections do."""
        os.kill(self.process.pid, signal.SIGUSR1)

    def restart(self) -> None:
        """Starts it again on the port that it had."""
        self.close()
        self.options["port"] = self.port
        self._start()
        assert self.address


class Pool:
    """Live workers that are used again and again, so that few have to be started."""

    def __init__(self, folder: Path):
        self._folder = folder
        self._shared: list[WorkerProcess] = []
        self._own: list[WorkerProcess] = []

    def __call__(self, count: int, **options) -> list[WorkerProcess]:
        """So many workers that serve nobody. Those with options belong to one test."""
        if options:
            new = [WorkerProcess(self._folder, **options) for _ in range(count)]
            self._own += new
            return new
        gone = [worker for worker in self._shared if not worker.alive]
        self._shared = [worker for worker in self._shared if worker not in gone]
        for worker in gone:
            worker.close()
        while len(self._shared) < count:
            self._shared.append(WorkerProcess(self._folder))
        return self._shared[:count]

    def end_own(self) -> None:
        """Ends those that belong to one test."""
        for worker in self._own:
            worker.close()
        self._own = []

    def close(self) -> None:
        self.end_own()
        for worker in self._shared:
            worker.close()


def eventually(holds: Callable[[], object], message: Callable[[], str] = lambda: "", seconds: float = SECONDS) -> None:
    """Waits until it holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, message()
        time.sleep(0.01)
