"""Workers in processes of their own, for tests that talk to them and break them."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).parents[2]
SECONDS = 60.0
"""How long a machine that does much else may take for what takes a moment."""
STEP_TIMEOUT = 4.0


class WorkerProcess:
    """A live worker. ``options``: those of `run_worker`; ``lines``: what it has said so far."""

    def __init__(self, slices: Path, **options):
        self.options = {"cache": str(slices), **options}
        self.lines: list[str] = []
        self._start()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.cluster.run_worker", json.dumps(self.options)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.port = None
        self._reader = threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True)
        self._reader.start()

    @property
    def address(self) -> str:
        eventually(lambda: self.port or self.process.poll() is not None)
        assert self.port, f"the worker did not start: {self.lines}"
        return f"127.0.0.1:{self.port}"

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    @property
    def rss(self) -> int:
        """Bytes of memory in use, mapped files included."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) * 1024

    def said(self, words: str, since: int = 0) -> None:
        """Waits until it says so, in a line after the first ``since`` ones."""
        eventually(lambda: any(words in line for line in self.lines[since:]), lambda: f"{words!r} not in {self.lines}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """SIGSTOP: its connections stay, but it does nothing."""
        self.process.send_signal(signal.SIGSTOP)

    def hang(self) -> None:
        """It does nothing any more, but its threads that keep the connections do."""
        self.process.send_signal(signal.SIGUSR1)

    def go_on(self) -> None:
        self.process.send_signal(signal.SIGCONT)

    def restart(self) -> None:
        """Starts it again on the port that it had."""
        self.kill()
        self.options["port"] = self.port
        self._start()
        assert self.address

    def close(self) -> None:
        self.kill()
        self.process.stdin.close()
        self._reader.join()
        self.process.stdout.close()

    def _read(self, stdout) -> None:
        for line in stdout:
            if self.port is None and line.strip().isdecimal():
                self.port = int(line)
            else:
                self.lines.append(line.rstrip("\n"))


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


def is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
