"""Real workers for the command line to be tried on: processes of this machine, with keys of their own."""

import os
import re
import signal
import subprocess
import threading
from pathlib import Path

from dllama.folders import cache_folder
from tests.cli.program import ROOT, command


class Worker:
    """`dllama worker` on a free port of 127.0.0.1, for a user whose home is a folder of its own."""

    def __init__(self, folder: Path, *options):
        self.environment = {
            "XDG_CONFIG_HOME": str(folder / "config"),
            "XDG_CACHE_HOME": str(folder / "cache"),
            "DLLAMA_KEY_FILE": "",
            "NUMBA_CACHE_DIR": os.environ.get("NUMBA_CACHE_DIR") or str(cache_folder()),  # compile once for all
        }
        self.key_file = folder / "config" / "dllama" / "cluster.key"
        self.process = subprocess.Popen(
            command("worker", "--host", "127.0.0.1", "--port", "0", "--nthreads", "1", *options),
            cwd=ROOT,
            env=os.environ | self.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.lines: list[str] = []
        self._said = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.port = int(self.says(r"listening on 127\.0\.0\.1:(\d+), ")[1])
        self.address = f"127.0.0.1:{self.port}"
        self.says(" reaches it with ")  # the last of its first lines

    def says(self, pattern: str, times: int = 1) -> re.Match:
        """The match in the line that matches for the last time of so many; waits for it."""
        with self._said:
            found = self._said.wait_for(lambda: self._matches(pattern, times) or not self._reader.is_alive(), 30)
        assert found and len(self._matches(pattern)) >= times, "\n".join(self.lines)
        return self._matches(pattern)[times - 1]

    def end(self, number: int = signal.SIGTERM) -> int:
        """Its exit status after a signal."""
        self.process.send_signal(number)
        status = self.process.wait(5)
        self._reader.join(5)
        self.process.stderr.close()
        return status

    def _matches(self, pattern: str, times: int = 0) -> list[re.Match]:
        matches = [match for match in (re.search(pattern, line) for line in self.lines) if match]
        return matches if len(matches) >= times else []

    def _read(self) -> None:
        for line in self.process.stderr:
            with self._said:
                self.lines.append(line.rstrip("\n"))
                self._said.notify_all()
        with self._said:
            self._said.notify_all()

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        if self.process.poll() is None:
            self.end(signal.SIGKILL)
