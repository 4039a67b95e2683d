"""What `dllama plan` predicts for boards that nobody has measured yet: the table in deploy/README.md.

    python -m bench.boards

A plan needs nothing of a model but its shape: the models are files of the right header and length, and have no weights.
"""

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from bench.synth import SHAPES
from dllama.formats.header import pack_header
from dllama.formats.layout import weights_bytes

MODELS = {"Llama 2 7B": "llama2-7b", "TinyLlama 1.1B": "tinyllama-1.1b", "Llama 2 13B": "llama2-13b"}
DEVICES = {"Pi 4": "pi4", "Pi 5": "pi5"}
COUNTS = (1, 2, 3, 4, 8)
CONTEXT = 2048
SMALL = 3.5e9
"""Bytes that a board of 4 GB has for a share, about."""
LARGE = 7.3e9
"""… and one of 8 GB."""


def main() -> None:
    print(f"dllama plan --model MODEL.m --count N --device {'|'.join(DEVICES.values())} --context {CONTEXT}\n")
    print(row("", map(str, COUNTS)))
    with tempfile.TemporaryDirectory() as folder:
        for name, shape in MODELS.items():
            model = write_shape(shape, Path(folder) / f"{shape}.m")
            for board, device in DEVICES.items():
                print(row(f"{name}, {board}, predicted", (cell(model, device, count) for count in COUNTS)))


def row(title: str, cells: Iterable[str]) -> str:
    """A row of a table in Markdown."""
    return "|".join(["", *(f" {text} " if text else " " for text in (title, *cells)), ""])


def write_shape(shape: str, path: Path) -> Path:
    """A model of this shape, all of whose weights are a hole in the file."""
    header = pack_header(SHAPES[shape])
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + weights_bytes(SHAPES[shape]))
    return path


def cell(model: Path, device: str, count: int) -> str:
    """Tokens per second, and what has to be known beside them."""
    command = [sys.executable, "-m", "dllama", "plan", "--model", model, "--count", str(count)]
    command += ["--device", device, "--context", str(CONTEXT), "--json"]
    plan = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    nodes = plan["nodes"]
    needed = max(node["memory_bytes"] for node in nodes)
    if needed > LARGE:
        return ""
    notes = ["needs 8 GB"] * (needed > SMALL) + [f"with {len(nodes)}"] * (len(nodes) < count)
    return f"{1000 / plan['token_ms']:#.3g}" + (f" ({', '.join(notes)})" if notes else "")


if __name__ == "__main__":
    main()
