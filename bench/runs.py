"""One program in a process of its own: the job it gets, what it reports, and the measuring inside.

`run` starts `bench.run_dllama` or `bench.run_llama_cpp`; there, `run_arguments` reads the job and `measure` does it and
prints the `Run` as JSON. Imports are few, since a process's start is measured too.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class Job:
    """What a run does: `repeats` times from an empty cache, read `prompt` tokens, then decode `tokens` more."""

    threads: int
    context: int
    prompt: int = 16
    tokens: int = 1
    repeats: int = 1


@dataclass(frozen=True)
class Run:
    """What a run found. Times are wall clock around the program's own calls, sampling by argmax included."""

    program: str
    first_token_ms: float  # from the start of the process to the first token of a 16-token prompt
    prefill_ms: list[float]  # one a repeat: the whole prompt, until its first token is known
    token_ms: list[float]  # one a decoded token, all repeats
    peak_bytes: int  # most resident memory at any time, pages of mapped files included
    kernels: str  # what the program says about the instructions it uses


@dataclass(frozen=True)
class Weights:
    """The same synthetic weights for both programs."""

    shape: str
    model: Path
    tokenizer: Path
    gguf: Path


def run(program: str, job: Job, weights: Weights, kernels: str | None = None) -> Run:
    """Run `program` ("dllama" or "llama.cpp") once in a fresh process; `kernels` forces dllama's."""
    module, model = {
        "dllama": ("bench.run_dllama", weights.model),
        "llama.cpp": ("bench.run_llama_cpp", weights.gguf),
    }[program]
    command = [sys.executable, "-m", module, str(model), "--tokenizer", str(weights.tokenizer)]
    for name, value in asdict(job).items():
        command += [f"--{name}", str(value)]
    environment = dict(os.environ, DLLAMA_KERNELS=kernels) if kernels else os.environ
    started = ["--started", repr(time.monotonic())]
    result = subprocess.run(command + started, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
        raise SystemExit(f"{program} failed: {reason}\nsee it again with: {shlex.join(command)}")
    return Run(**json.loads(result.stdout.splitlines()[-1]))


def run_arguments() -> tuple[argparse.Namespace, Job]:
    """The command line of a run: the model, its tokenizer, when the process was started, and the job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--tokenizer")
    parser.add_argument("--started", type=float, default=time.monotonic(), help="time.monotonic() of the parent")
    for name, default in (("threads", 2), ("context", 2048), ("prompt", 16), ("tokens", 1), ("repeats", 1)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args()
    job = Job(options.threads, options.context, options.prompt, options.tokens, options.repeats)
    return options, job


def measure(program: str, job: Job, started: float, kernels: str, generate: Callable[[list[int], int], list[float]]):
    """Do `job` with `generate` and print the Run.

    `generate(prompt, tokens)` starts from an empty cache and returns 1 + `tokens` times in ms: of the prompt until its
    first token, and of each decoded token after it.
    """
    generate(prompt_ids(16), 0)
    first_token_ms = (time.monotonic() - started) * 1e3
    generate(prompt_ids(16), 8)
    times = [generate(prompt_ids(job.prompt), job.tokens) for _ in range(job.repeats)]
    token_ms = [ms for each in times for ms in each[1:]]
    found = Run(program, first_token_ms, [each[0] for each in times], token_ms, peak_bytes(), kernels)
    print(json.dumps(asdict(found)))


def prompt_ids(n: int) -> list[int]:
    """`n` ids of ordinary tokens, spread over the small vocabularies too: their values do not change the speed."""
    return [259 + (i * 97) % 200 for i in range(n)]


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    try:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    except (OSError, IndexError):
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
