"""How fast does a checkpoint become a `.m` file, and in how much memory?

    python -m bench.convert [--layers 8] [--dir FOLDER]

The checkpoint has the shape of Llama 2 7B, with fewer layers: F16, in safetensors, from a normal distribution. Each
conversion is a process of its own, held to one core with one thread and then to all; the time is that of the whole
command, the hashing of the source, the start of Python and the flush to the disk with it. "For a second of a core" is
the input over the seconds that processors worked for the command, the program's own and the system's on its behalf:
what a core converts while it is not waiting for the disk. The source lies in the page cache, as far as that holds it,
compiled kernels in theirs: a first conversion does not count.
"""

import argparse
import json
import os
import re
import struct
import subprocess
import sys
import textwrap
import time
from dataclasses import asdict
from pathlib import Path
from typing import NamedTuple

import numpy as np

from bench.harness import WEIGHTS, take_turns
from bench.report import Figure, print_table, save

DIM, HIDDEN, HEADS, VOCAB = 4096, 11008, 32, 32000
WAYS = {
    "q40, least error": ["q40"],
    "q40, reference": ["q40", "--reference"],
    "q80": ["q80"],
    "f16": ["f16"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=8, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--dir", type=Path, default=WEIGHTS, help="folder that keeps the checkpoint")
    options = parser.parse_args()
    folder = find_checkpoint(options.dir, options.layers)
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    out = folder.with_name("converted.m")

    cores = sorted(os.sched_getaffinity(0))
    sides = {
        (way, len(held)): lambda arguments=arguments, held=held: convert(folder, out, arguments, held)
        for way, arguments in WAYS.items()
        for held in (cores[:1], cores)
    }
    convert(folder, out, ["q40"], cores)
    rounds = take_turns(options.rounds, sides)

    speed = {side: Figure.of([nbytes / 1e6 / run.seconds for run in runs]) for side, runs in rounds.items()}
    core = {side: Figure.of([nbytes / 1e6 / run.worked for run in runs]) for side, runs in rounds.items()}
    peak = {side: Figure.of([run.peak_bytes / 1e6 for run in runs]) for side, runs in rounds.items()}
    print(f"\nLlama 2 7B with {options.layers} layers, F16, {nbytes / 1e9:.2f} GB\n")
    print_table(
        ("weights", "cores", "input", "for a second of a core", "peak memory"),
        [
            (way, n, speed[way, n].text(0, " MB/s"), core[way, n].text(0, " MB"), peak[way, n].text(0, " MB"))
            for way, n in sides
        ],
    )
    save(
        "convert",
        {
            "question": "convert",
            "input_bytes": nbytes,
            "layers": options.layers,
            "mb_per_s": {f"{way}, {n} cores": asdict(speed[way, n]) for way, n in sides},
            "mb_per_core_second": {f"{way}, {n} cores": asdict(core[way, n]) for way, n in sides},
            "peak_mb": {f"{way}, {n} cores": asdict(peak[way, n]) for way, n in sides},
        },
    )


class Run(NamedTuple):
    """What one conversion took: seconds from start to end, those that cores worked, and memory."""

    seconds: float
    worked: float
    peak_bytes: int


def convert(folder: Path, out: Path, arguments: list[str], cores: list[int]) -> Run:
    """One conversion on these cores, with as many threads."""
    script = f"""
        import os, sys
        os.sched_setaffinity(0, {cores})
        from converter import cli, convert
        convert.THREADS = {len(cores)}
        try:
            cli.main({[str(folder), *arguments, "-o", str(out), "--force"]})
        finally:
            print(open("/proc/self/status").read())
    """
    started, before = time.monotonic(), os.times()
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    seconds, after = time.monotonic() - started, os.times()
    if done.returncode:
        raise SystemExit(done.stderr)
    for path in (out, out.with_name(out.name + ".json")):
        path.unlink()
    worked = after.children_user - before.children_user + after.children_system - before.children_system
    return Run(seconds, worked, int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) << 10)


def find_checkpoint(base: Path, n_layers: int) -> Path:
    """The checkpoint's folder, written where it is not there."""
    folder = base / f"llama2-7b-{n_layers}-layers"
    if (folder / "config.json").exists():
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    shapes = {"model.embed_tokens.weight": (VOCAB, DIM), "model.norm.weight": (DIM,), "lm_head.weight": (VOCAB, DIM)}
    for layer in range(n_layers):
        prefix = f"model.layers.{layer}."
        shapes |= {prefix + f"self_attn.{name}_proj.weight": (DIM, DIM) for name in "qkvo"}
        shapes |= {prefix + f"mlp.{name}_proj.weight": (HIDDEN, DIM) for name in ("gate", "up")}
        shapes |= {prefix + "mlp.down_proj.weight": (DIM, HIDDEN)}
        shapes |= {prefix + f"{name}_layernorm.weight": (DIM,) for name in ("input", "post_attention")}
    header, offset = {}, 0
    for name, shape in shapes.items():
        nbytes = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": shape, "data_offsets": [offset, offset + nbytes]}
        offset += nbytes
    text = json.dumps(header).encode()
    rng = np.random.default_rng(0)
    print(f"writing {offset / 1e9:.2f} GB to {folder}", file=sys.stderr)
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in shapes.values():
            for _ in range(shape[0] if len(shape) == 2 else 1):
                file.write((rng.standard_normal(shape[-1], dtype=np.float32) / 50).astype("<f2"))
    config = {
        "architectures": ["LlamaForCausalLM"], "hidden_size": DIM, "intermediate_size": HIDDEN, "vocab_size": VOCAB,
        "num_hidden_layers": n_layers, "num_attention_heads": HEADS, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-05,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


if __name__ == "__main__":
    main()
