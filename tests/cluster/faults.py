"""Faults at random moments: workers are killed, stopped, restarted and cut off while a cluster runs.

    python -m tests.cluster.faults --runs 1000 --lanes 4

Each run has a root and one to three workers, that live on from run to run, and two texts; one or two faults happen
somewhere in it. It has to end with the right texts, or with an error of one line where it happened at the start, and
in less than 30 s. A run is the same for the same seed, but for what two machines that run at once leave to chance.
"""

import argparse
import contextlib
import faulthandler
import gc
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import statistics
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field
from multiprocessing import forkserver
from pathlib import Path

from bench.report import save
from dllama import Llama, SamplerSettings
from dllama.cluster.settings import ClusterSettings
from dllama.errors import DllamaError
from dllama.formats import FloatType
from tests.cluster import nodes
from tests.cluster.checkpoints import SHAPES, VOCAB
from tests.cluster.forwarder import Forwarder
from tests.cluster.processes import STEP_TIMEOUT, Process, WorkerProcess, eventually
from tests.engine.models import random_model
from tests.tokenizer.models import train

GREEDY = SamplerSettings(temperature=0)
LIMIT_SECONDS = 30.0
STEPS = 24
SHORT = "Question: Tom has 3 apples"
LONG = "Question: Tom has 3 apples and buys 4 more. How many apples does he have now? Answer: " * 8
TOKENS = [random.Random(0).randrange(3, VOCAB) for _ in range(30)]
WORKERS = 5
"""Of a lane; a run takes up to three of them, the others start anew meanwhile."""

MOMENTS = {"start": 0.5, "transfer": 0.3, "prompt": 0.4, "text": 0.01, "idle": 0.3}
"""When faults happen, and how many seconds later at most."""
KINDS = ("kill", "restart", "stop", "pause", "cut", "freeze", "cut between", "root")
WEIGHTS = (4, 4, 2, 2, 4, 2, 3, 1)
LASTING = 1
"""Workers that are never killed, to see whether what they hold grows."""


OUTCOMES = ("text", "error", "root killed")
"""The right texts, a clear error at the start, and a root that was killed and whose workers wait for the next one."""


@dataclass
class Result:
    """How a run went. ``struck``: faults that happened while the cluster was up;  ``noticed``: seconds from the first
    fault to each of the root's messages about a loss"""

    number: int
    nodes: int
    moment: str
    faults: list[str]
    outcome: str = "text"
    struck: int = 0
    seconds: float = 0.0
    noticed: list[float] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)

    @property
    def failed(self) -> bool:
        return self.outcome not in OUTCOMES or self.seconds > LIMIT_SECONDS


class Lane:
    """A root, its workers, and runs one after another."""

    def __init__(self, folder: Path):
        folder.mkdir()
        forkserver.ensure_running()
        self._others = _descendants(os.getpid())
        self._restarting = threading.Lock()
        self._cache = folder / "slices"
        self._workers = [WorkerProcess(self._cache, port=_free_port()) for _ in range(WORKERS)]
        for worker in self._workers:
            assert worker.address
        self._cables = [Forwarder(worker.port) for worker in self._workers]
        tokenizer = train(folder / "tokenizer.model", vocab_size=VOCAB)
        shape = {**SHAPES["gqa"], "dim": 768, "hidden_dim": 2048, "n_layers": 6}
        random_model(folder / "model.m", shape, FloatType.Q40).close()
        self._large = {"model": folder / "model.m", "tokenizer": tokenizer, "context": 64}
        self._expected = {name: self._alone(name) for name in MOMENTS}
        self.memory: list[tuple[int, int]] = []  # of the root and of the workers that last, after each run

    def _alone(self, moment: str) -> list[int]:
        with Llama(**self._options(moment)) as llama:
            return [piece.token_id for piece in llama.generate(self._prompt(moment), STEPS, GREEDY)]

    def _options(self, moment: str) -> dict:
        return {"nthreads": 1, "buffer_float_type": "f32"} | (self._large if moment == "transfer" else {})

    def _prompt(self, moment: str):
        return {"prompt": LONG, "transfer": TOKENS}.get(moment, SHORT)

    def run(self, seed: int, number: int) -> Result:
        chance = random.Random(f"{seed} {number}")
        chosen = chance.sample(range(WORKERS), chance.randint(1, 3))
        moment = chance.choice(list(MOMENTS))
        result = Result(number, 1 + len(chosen), moment, [])
        faults = []
        for _ in range(1 + (chance.random() < 0.2)):
            kind, victim = chance.choices(KINDS, WEIGHTS)[0], chance.choice(chosen)
            if kind == "cut between" and len(chosen) == 1 or kind in ("kill", "restart") and victim < LASTING:
                kind = "cut"
            delay = chance.uniform(0, MOMENTS[moment])
            faults.append((kind, victim, delay, chance.uniform(0.2, 6)))
            result.faults.append(f"{kind} {victim} after {delay:.3f} s")
        for slot in chosen:
            assert self._workers[slot].address, "it listens again"
        if moment == "transfer":
            shutil.rmtree(self._cache, ignore_errors=True)
        said = {slot: len(self._workers[slot].lines) for slot in chosen}
        at = chance.randrange(1, STEPS)
        start = time.monotonic()
        faulthandler.dump_traceback_later(4 * LIMIT_SECONDS, exit=True)
        if any(kind == "root" for kind, *_ in faults):
            self._lose_root(chosen, result, faults[0][2])
        else:
            self._write(chosen, result, faults, at)
        result.seconds = time.monotonic() - start
        self._clear_up(chosen, said, result)
        faulthandler.cancel_dump_traceback_later()
        gc.collect()
        self.memory.append((_rss(os.getpid()), max(worker.rss for worker in self._workers[:LASTING])))
        return result

    def _write(self, chosen: list[int], result: Result, faults: list, at: int) -> None:
        """Two texts, with faults somewhere. Sets the outcome."""
        moment, struck = result.moment, []
        timers = []

        def strike() -> None:
            for kind, victim, delay, pause in faults:
                timer = threading.Timer(delay, self._strike, (kind, victim, pause, struck))
                timer.start()
                timers.append(timer)

        def notify(line: str) -> None:
            result.lines.append(line)
            if " is lost " in line and struck:
                result.noticed.append(time.monotonic() - struck[0])

        addresses = tuple(self._cables[slot].address for slot in chosen)
        settings = ClusterSettings(addresses, None, (1.0,) * result.nodes, step_timeout=STEP_TIMEOUT)
        try:
            if moment in ("start", "transfer"):
                strike()
            with Llama(cluster=settings, notify=notify, **self._options(moment)) as llama:
                for text in range(2):
                    if text == (moment == "idle") and moment in ("prompt", "idle"):
                        strike()
                        if moment == "idle":
                            time.sleep(faults[0][2])
                    ids = []
                    for piece in llama.generate(self._prompt(moment), STEPS, GREEDY):
                        ids.append(piece.token_id)
                        if moment == "text" and text == 0 and len(ids) == at:
                            strike()
                    if ids != self._expected[moment]:
                        result.outcome = f"another text: {ids}"
        except DllamaError as error:
            one_line = "\n" not in str(error) and str(error)
            result.outcome = (
                "error" if one_line and moment in ("start", "transfer") else "error where there should be none"
            )
            result.lines.append(str(error))
        except Exception as error:
            result.outcome = f"crash: {type(error).__name__}: {error}"
        result.struck = len(struck)
        for timer in timers:
            timer.join()

    def _strike(self, kind: str, victim: int, pause: float, struck: list[float]) -> None:
        worker, cable = self._workers[victim], self._cables[victim]
        struck.append(time.monotonic())
        if kind == "kill":
            worker.kill()
        elif kind == "restart":
            with self._restarting:  # two faults may ask for it at once
                self._workers[victim] = self._again(self._workers[victim])
        elif kind in ("stop", "pause"):
            with contextlib.suppress(ProcessLookupError):  # another fault has ended it
                worker.stop()
                if kind == "pause":
                    time.sleep(pause)
                    worker.go_on()
        elif kind == "cut":
            cable.cut()
        elif kind == "cut between":
            cable.cut(1)
        elif kind == "freeze":
            cable.freeze()

    def _lose_root(self, chosen: list[int], result: Result, delay: float) -> None:
        """A root of its own process, that is killed."""
        with Process(nodes.endless_root, *(self._cables[slot].address for slot in chosen)) as root:
            if result.moment not in ("start", "transfer"):
                eventually(lambda: root.lines or not root.alive)
            time.sleep(delay)
        result.outcome, result.struck = "root killed", 1

    def _clear_up(self, chosen: list[int], said: dict[int, int], result: Result) -> None:
        """Until all is as before: those that are gone start anew, the others have to be free again."""
        for slot in chosen:
            worker = self._workers[slot]
            self._cables[slot].mend()
            if not worker.alive:
                self._workers[slot] = self._again(worker)
                continue
            with contextlib.suppress(ProcessLookupError):
                worker.go_on()
            start = said[slot] if said[slot] <= len(worker.lines) else 0
            try:
                eventually(lambda worker=worker, start=start: _is_free(worker.lines[start:]), seconds=LIMIT_SECONDS)
            except AssertionError:
                result.outcome = f"not free: {worker.lines[start:]}"
                worker.kill()
                self._workers[slot] = self._again(worker)

    def _again(self, worker: WorkerProcess) -> WorkerProcess:
        """A new process in the place of one that is gone, on the same port."""
        worker.close()
        return WorkerProcess(self._cache, **worker.options)

    def close(self) -> list[int]:
        """Ends all; the processes that are left all the same."""
        for cable in self._cables:
            cable.close()
        for worker in self._workers:
            worker.close()
        return sorted(_descendants(os.getpid()) - self._others)


def _is_free(lines: list[str]) -> bool:
    """Whether what a worker has said since it was free means that it is so again."""
    came = [number for number, line in enumerate(lines) if "a root has come" in line]
    gone = [number for number, line in enumerate(lines) if line.startswith("the root ")]
    return len(gone) >= len(came)


def _free_port() -> int:
    """A port outside of what systems give out by themselves, so that it is free again when the worker starts anew."""
    while True:
        with contextlib.suppress(OSError), socket.socket() as trial:
            trial.bind(("127.0.0.1", random.randrange(10_000, 32_000)))
            return trial.getsockname()[1]


def _descendants(pid: int) -> set[int]:
    """The processes that this one and those below it have started and that still run."""
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        lists = [(task / "children").read_text().split() for task in Path(f"/proc/{pid}/task").iterdir()]
        children = {int(child) for found in lists for child in found}
        return children.union(*map(_descendants, children))
    return set()


def _rss(pid: int) -> int:
    return int(Path(f"/proc/{pid}/status").read_text().partition("VmRSS:")[2].split()[0]) * 1024


def run_lane(seed: int, numbers: Sequence[int], folder: Path) -> tuple[list[Result], list[tuple[int, int]], list[int]]:
    """Results, memory after each run, and processes left."""
    nodes.measure_little()
    lane, results = Lane(folder), []
    try:
        for number in numbers:
            results.append(lane.run(seed, number))
            if results[-1].failed:
                print(results[-1], flush=True)
            if len(results) % 20 == 0:
                print(f"{len(results)} of {len(numbers)} runs, {Counter(r.outcome for r in results)}", flush=True)
    finally:
        left = lane.close()
    return results, lane.memory, left


def run_lanes(seed: int, numbers: Sequence[int], lanes: int, folder: Path) -> list:
    """What `run_lane` gives for each of so many lanes, that share the runs and go side by side."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(lanes, context, signal.signal, (signal.SIGINT, signal.SIG_DFL)) as pool:
        shares, folders = [numbers[lane::lanes] for lane in range(lanes)], [folder / str(lane) for lane in range(lanes)]
        return list(pool.map(run_lane, [seed] * lanes, shares, folders))


def summary(seed: int, lanes: list) -> dict:
    """What all lanes have to tell together."""
    results = sorted((result for found, _, _ in lanes for result in found), key=lambda result: result.number)
    noticed = {}
    for kind in KINDS[:-1]:
        times = [
            max(r.noticed) for r in results if r.noticed and len(r.faults) == 1 and r.faults[0].startswith(f"{kind} ")
        ]
        if times:
            noticed[kind] = {"median_s": round(statistics.median(times), 3), "most_s": round(max(times), 3)}
    seconds = [result.seconds for result in results]
    return {
        "seed": seed,
        "runs": len(results),
        "faults": sum(len(result.faults) for result in results),
        "faults_while_the_cluster_was_up": sum(result.struck for result in results),
        "outcomes": dict(Counter(result.outcome.split(":")[0] for result in results)),
        "moments": dict(Counter(result.moment for result in results)),
        "kinds": dict(Counter(re.split(r" \d", fault)[0] for result in results for fault in result.faults)),
        "seconds": {"median": round(statistics.median(seconds), 2), "most": round(max(seconds), 2)},
        "noticed": noticed,
        "memory_mb_after_10_runs_and_at_the_end": {
            "roots": [[memory[min(9, len(memory) - 1)][0] // 10**6, memory[-1][0] // 10**6] for _, memory, _ in lanes],
            "workers": [
                [memory[min(9, len(memory) - 1)][1] // 10**6, memory[-1][1] // 10**6] for _, memory, _ in lanes
            ],
        },
        "processes_left": sum(len(left) for _, _, left in lanes),
        "errors": sorted({r.lines[-1] for r in results if r.outcome.startswith("error")})[:40],
        "failures": [asdict(result) for result in results if result.failed],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--lanes", type=int, default=4, help="runs at the same time")
    parser.add_argument("--only", type=int, metavar="N", help="nothing but this run")
    options = parser.parse_args()
    numbers = range(options.runs) if options.only is None else [options.only]
    lanes = min(options.lanes, len(numbers))
    with tempfile.TemporaryDirectory(prefix="dllama-faults-") as folder:
        found = summary(options.seed, run_lanes(options.seed, numbers, lanes, Path(folder)))
    print(json.dumps(found, indent=1))
    if options.only is None:
        save("faults", found)
    sys.exit(bool(found["failures"] or found["processes_left"]))


if __name__ == "__main__":
    main()
