"""A root and its workers as processes: where they run, how they are started, and what a run tells."""

import contextlib
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.emulate import Devices
from bench.runs import REPOSITORY, Weights
from dllama.cluster.digest import model_digest
from dllama.folders import cache_folder
from dllama.formats import ModelFile

PORT = 9998
START_SECONDS = 180  # until a worker listens: a weak device takes long for its imports
WARM_UP = 4  # tokens that do not count: the first steps touch memory for the first time
DLLAMA = (sys.executable, "-m", "dllama")


@dataclass(frozen=True)
class Place:
    """Where one node runs: how a process is started there, and the address that its worker gets."""

    popen: Callable[..., subprocess.Popen]
    host: str
    port: int = PORT

    @property
    def address(self) -> str:
        return f"{self.host}:{self.port}"


def on_devices(devices: Devices) -> list[Place]:
    """A place on each emulated device."""
    return [Place(device.popen, device.address) for device in devices]


def on_this_machine(count: int) -> list[Place]:
    """`count` places on this machine as it is, with ports that are free now."""
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return [Place(subprocess.Popen, "127.0.0.1", port) for port in ports]


@dataclass(frozen=True)
class ClusterRun:
    """What one run of the root told. Lists hold a value for each token that counts: without the first WARM_UP."""

    token_ms: list[float]
    inference_ms: list[float]
    transfer_ms: list[float]
    sent_bytes: list[int]
    received_bytes: list[int]
    prompt_tokens: int
    prefill_ms: float
    peak_bytes: int  # the root's resident set, pages of the mapped model included
    token_ids: list[int]
    first_token_s: float  # from the start of the process
    ready_s: float  # from the first try to reach the workers to the first token
    nodes: list[dict]  # per node, as the statistics have it; empty on one node

    @classmethod
    def of(cls, stats: dict, first_token_s: float) -> "ClusterRun":
        """From what `dllama inference --stats` wrote."""
        per_token = (stats[name][WARM_UP:] for name in TOKEN_FIELDS)
        return cls(
            *per_token,
            stats["prompt_tokens"],
            stats["prefill_ms"],
            stats["peak_rss_bytes"],
            stats["token_ids"],
            first_token_s,
            (stats["load_ms"] + stats["prefill_ms"]) / 1000,
            stats.get("nodes", []),
        )


TOKEN_FIELDS = ("decode_ms", "inference_ms", "transfer_ms", "sent_bytes", "received_bytes")


class Cluster:
    """Workers at all places but the first, which is the root's; for use in `with`.

    The key, the statistics, the logs and the workers' cache of slices are in a folder of its own, removed at the end.
    `own_copy` gives each worker the model file, so that nothing is sent; otherwise the root sends it its slice.
    `equal` asks for equal shares; otherwise the root measures the nodes, and leaves out those that would not help.
    """

    def __init__(
        self,
        places: Sequence[Place],
        weights: Weights,
        context: int,
        threads: int = 1,
        own_copy: bool = True,
        equal: bool = True,
    ):
        self.root, *self.workers = places
        self.weights, self.context, self.threads = weights, context, threads
        self.own_copy, self.equal = own_copy, equal
        self._folder = tempfile.TemporaryDirectory(prefix="dllama-bench-")
        self.folder = Path(self._folder.name)
        self.environment = dict(
            os.environ,
            DLLAMA_KEY_FILE=str(self.folder / "cluster.key"),
            NUMBA_CACHE_DIR=os.environ.get("NUMBA_CACHE_DIR", str(cache_folder())),
            XDG_CACHE_HOME=str(self.folder),
        )
        self.processes: list[subprocess.Popen] = []
        # A weak device would take long to read the whole model at its start.
        with ModelFile(weights.model) as model:
            model_digest(model)
        digests = cache_folder() / "digests"
        if digests.exists():
            (self.folder / "dllama").mkdir()
            (self.folder / "dllama" / "digests").symlink_to(digests.resolve())

    def __enter__(self) -> "Cluster":
        try:
            if self.workers:
                subprocess.run([*DLLAMA, "key", "make"], env=self.environment, check=True, stdout=subprocess.DEVNULL)
                self.start_workers()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self.stop_workers()
        self._folder.cleanup()

    def start_workers(self) -> None:
        """Start the workers and wait until they listen. Raises SystemExit for one that ends."""
        for place in self.workers:
            command = [*DLLAMA, "worker", "--host", place.host, "--port", place.port, "--nthreads", self.threads]
            if self.own_copy:
                command += ["--model", self.weights.model]
            self.processes.append(self._start(place, command, stdout=subprocess.DEVNULL, stderr=self._log(place)))
        deadline = time.monotonic() + START_SECONDS
        for place, process in zip(self.workers, self.processes, strict=True):
            while not listens(process.pid, place.port):
                if process.poll() is not None or time.monotonic() > deadline:
                    state = f"exit code {process.returncode}" if process.returncode else f"not up in {START_SECONDS} s"
                    raise SystemExit(f"worker {place.address}: {last_line(self._log_path(place)) or state}")
                time.sleep(0.05)

    def slices(self) -> list[Path]:
        """The files that the workers keep their slices in."""
        return [path for path in (self.folder / "dllama" / "slices").rglob("*") if path.is_file()]

    def stop_workers(self) -> None:
        """End the workers."""
        for process in self.processes:
            process.kill()
            process.wait()
        self.processes.clear()

    def run(self, tokens: int, nodes: int | None = None, prompt: int = 16) -> ClusterRun:
        """Generate `WARM_UP` and then `tokens` tokens that count, on so many of the nodes, or all of them.

        Raises SystemExit with the root's last line.
        """
        workers = self.workers if nodes is None else self.workers[: nodes - 1]
        stats, text = self.folder / "stats.json", self.folder / "prompt.txt"
        text.write_text("a" * (prompt - 2))  # a token each, after the two that begin the text
        command = [*DLLAMA, "inference", "--model", self.weights.model, "--tokenizer", self.weights.tokenizer]
        command += ["--prompt-file", text, "--steps", WARM_UP + tokens, "--max-seq-len", self.context]
        command += ["--temperature", 0, "--nthreads", self.threads, "--stats", stats]
        if workers:
            command += ["--workers", *(place.address for place in workers)]
            if self.equal:
                command += ["--ratios", ":".join("1" * (1 + len(workers)))]
        start, first_token_s = time.monotonic(), 0.0
        process = self._start(self.root, command, stdout=subprocess.PIPE, stderr=self._log(self.root), text=True)
        with process:
            for line in process.stdout:
                if not first_token_s and line.startswith("🔶"):
                    first_token_s = time.monotonic() - start
        if process.returncode:
            reason = last_line(self._log_path(self.root)) or f"exit code {process.returncode}"
            raise SystemExit(f"dllama failed: {reason}\nsee it again with: {shlex.join(map(str, command))}")
        return ClusterRun.of(json.loads(stats.read_text()), first_token_s)

    def _start(self, place: Place, command: Sequence, **options) -> subprocess.Popen:
        environment = {**self.environment, "PYTHONUNBUFFERED": "1"}
        return place.popen([str(part) for part in command], env=environment, cwd=REPOSITORY, **options)

    def _log_path(self, place: Place) -> Path:
        return self.folder / f"{place.address.replace(':', '-')}.log"

    def _log(self, place: Place):
        return open(self._log_path(place), "w")


def listens(pid: int, port: int) -> bool:
    """Whether somebody listens on a TCP port, in the network namespace of process `pid`."""
    lines = []
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(OSError):  # it has ended, or the machine has no IPv6
            lines += Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
    return any(local.endswith(f":{port:04X}") and state == "0A" for _, local, _, state, *_ in map(str.split, lines))


def last_line(path: Path) -> str:
    """The last line of a log, "" where it is empty."""
    lines = path.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""


def as_json(runs: dict[str, list[ClusterRun]]) -> dict[str, list[dict]]:
    """Every value of every run, for the results file."""
    return {name: [asdict(run) for run in each] for name, each in runs.items()}
