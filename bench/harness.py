"""What the measures share: their options, the weights, and programs that take turns."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from bench import synth
from bench.runs import Job, Weights
from dllama.folders import cache_folder

WEIGHTS = cache_folder() / "bench"


def question(description: str, **defaults) -> argparse.Namespace:
    """The command line that the measures share. `defaults` override an option's default or add an int option."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=synth.SHAPES, default="tinyllama-1.1b", help="default %(default)s")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="threads of both programs")
    parser.add_argument("--kernels", help="force dllama's kernels (avx512, avx2, ...); llama.cpp stays as it is")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each program")
    parser.add_argument("--dir", type=Path, default=WEIGHTS, help="folder that keeps the synthetic weights")
    parser.add_argument("--name", help="name of the results file, without .json")
    for name, value in defaults.items():
        if parser.get_default(name) is None:
            parser.add_argument(f"--{name}", type=int, default=value, help="default %(default)s")
        else:
            parser.set_defaults(**{name: value})
    return parser.parse_args()


def job_of(options: argparse.Namespace) -> Job:
    """The job that a question's options ask for, in a context of 2,048 tokens or the model's where that is less."""
    context = min(synth.SHAPES[options.shape].seq_len, 2048)
    job = Job(options.threads, context, options.prompt, getattr(options, "tokens", 0))
    if job.prompt + job.tokens + 1 > context:
        raise SystemExit(f"--prompt and --tokens: {job.prompt} + {job.tokens} + 1 tokens, and the context is {context}")
    return job


def find_weights(shape: str, folder: Path, gguf: bool = True) -> Weights:
    """The weights of `shape` in `folder`, written if they are not there, and read once into the page cache.

    Without `gguf` the file for llama.cpp may be missing.
    """
    folder = folder.resolve()  # runs start in the repository
    weights = Weights(shape, *(folder / f"{shape}.{ending}" for ending in ("m", "t", "gguf")))
    models = (weights.model, weights.gguf) if gguf else (weights.model,)
    if not all(path.exists() for path in (*models, weights.tokenizer)):
        folder.mkdir(parents=True, exist_ok=True)
        print(f"writing {shape} weights to {folder}", file=sys.stderr)
        synth.write(shape, weights.model, weights.gguf if gguf else None, weights.tokenizer)
    for path in models:
        with open(path, "rb", buffering=0) as file:
            chunk = bytearray(1 << 24)
            while file.readinto(chunk):
                pass
    return weights


def take_turns(rounds: int, sides: dict[str, Callable[[], object]]) -> dict[str, list]:
    """Call each side once a round, in turn, and collect what it returns."""
    return in_rounds(rounds, lambda label: one_turn(label, sides))


def in_rounds(rounds: int, turn: Callable[[str], dict[str, object]]) -> dict[str, list]:
    """Collect what a turn of each round returns by name; it is given the round's label."""
    found: dict[str, list] = {}
    for i in range(rounds):
        for name, each in turn(f"round {i + 1} of {rounds}").items():
            found.setdefault(name, []).append(each)
    return found


def one_turn(label: str, sides: dict[str, Callable[[], object]]) -> dict[str, object]:
    """Call each side once, and tell so."""
    found = {}
    for name, side in sides.items():
        print(f"{label}: {name}", file=sys.stderr, flush=True)
        found[name] = side()
    return found
