"""Edges of PrivateLoRA that use one cloud, as processes."""

import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bench.runs import REPOSITORY, Weights
from dllama.cluster.local import local_cloud
from dllama.formats import ModelFile
from dllama.privatelora.adapter import CloudAdapter, EdgeAdapter, write_adapter
from dllama.privatelora.shape import AdapterShape

RANK, TARGETS = 128, ("q", "k", "v")


def make_adapter(weights: Weights, folder: Path) -> Path:
    """An adapter of random M for a model, its A and B from a seed."""
    with ModelFile(weights.model) as model:
        shape = AdapterShape.of(model.config, RANK, RANK, TARGETS)
    cloud, random = CloudAdapter(shape, seed=1), np.random.default_rng(0)
    m = {place: random.standard_normal(shape.m).astype(np.float16) for place in shape.places()}
    write_adapter(folder, cloud, EdgeAdapter(shape, m, cloud.fingerprint, 1))
    return folder


@contextmanager
def cloud_for(weights: Weights, folder: Path, *options: str) -> Iterator["Cloud"]:
    """A cloud on this machine: of one thread on the CPU, unless the options of its worker say otherwise."""
    with local_cloud(weights.model, 1, options=options) as settings:
        key_file = folder / "key"
        key_file.touch(0o600)
        key_file.write_text(settings.key.text)
        yield Cloud(weights, settings.workers[0], key_file)


@dataclass(frozen=True)
class Cloud:
    """A cloud that edges can use, at an address."""

    weights: Weights
    address: str
    key_file: Path

    @contextmanager
    def edge(
        self, adapter: Path | None, tokens: int, threads: int = 1, address: str | None = None
    ) -> Iterator[subprocess.Popen]:
        """An edge that generates so many tokens whenever it is asked, once it is up; ``address``: of a way to the
        cloud."""
        command = [sys.executable, "-m", "bench.run_edge", str(self.weights.model), str(self.weights.tokenizer)]
        command += [address or self.address, "--key-file", str(self.key_file), "--form", "q80"]
        command += ["--tokens", str(tokens), "--threads", str(threads)]
        if adapter is not None:
            command += ["--adapter", str(adapter)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen(command, cwd=REPOSITORY, **pipes) as process:
            try:
                yield process
            finally:
                process.stdin.close()


def wait_for(*edges: subprocess.Popen) -> None:
    """Until they are up."""
    for edge in edges:
        _expect(edge, "up\n")


def generate(*edges: subprocess.Popen) -> list[dict]:
    """Has edges generate at once; what each has found."""
    for edge in edges:
        _tell(edge)
        _expect(edge, "ready\n")
    for edge in edges:
        _tell(edge)
    return [json.loads(edge.stdout.readline()) for edge in edges]


def _tell(edge: subprocess.Popen) -> None:
    edge.stdin.write("\n")
    edge.stdin.flush()


def _expect(edge: subprocess.Popen, line: str) -> None:
    if edge.stdout.readline() != line:
        raise SystemExit("an edge has failed")


def throughput(edges: list[dict]) -> float:
    """Tokens a second of all edges together while all of them generate."""
    first, last = max(edge["moments"][0] for edge in edges), min(edge["moments"][-1] for edge in edges)
    return sum(sum(first < moment <= last for moment in edge["moments"]) for edge in edges) / (last - first)
