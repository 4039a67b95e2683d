"""Clouds in processes of their own, and edges that talk to them."""

from collections.abc import Callable
from contextlib import contextmanager

import numpy as np

from dllama.engine.candidates import Reduction
from dllama.engine.interface import Row
from dllama.engine.workspace import MAX_ROWS
from dllama.formats import FloatType, ModelFile
from dllama.kernels.team import Team
from dllama.privatelora.backends.open import open_backend
from dllama.privatelora.cloud import Cloud, CloudSettings
from dllama.privatelora.edge import EdgeEngine
from dllama.privatelora.settings import EdgeSettings
from tests.cluster.nodes import say
from tests.cluster.processes import Process


def cloud(model: str, port: int = 0, nthreads: int = 1, device: str = "cpu", types=("f32", "f32"), **options) -> None:
    """A cloud, with these of the `CloudSettings`; says its port, and what happens."""
    backend = open_backend(device, nthreads, *map(FloatType.parse, types), say)
    node = Cloud(CloudSettings("127.0.0.1", port, options.pop("key", None), nthreads, model, **options), backend, say)
    say(str(node.port))
    node.serve()


class CloudProcess(Process):
    """A live cloud. ``options``: those of ``cloud``."""

    def __init__(self, model: str, **options):
        super().__init__(cloud, str(model), **options)

    def restart(self) -> None:
        """Starts it again on the port that it had."""
        self.close()
        self.options["port"] = self.port
        self._start()
        assert self.address


@contextmanager
def edge(
    model: ModelFile, address: str, notify: Callable[[str], None] = lambda line: None, types=("f32", "f32"), **options
):
    """An edge's engine. ``options``: those of `EdgeSettings`."""
    settings = EdgeSettings(address, options.pop("key", None), **{"form": "f32", **options})
    team = Team(1)
    engine = EdgeEngine(
        model, team, model.config.seq_len, *map(FloatType.parse, types), settings, notify, lambda *_: None
    )
    try:
        yield engine
    finally:
        engine.close()
        team.close()


def run(engine, tokens, sequence=None, first: int = 0) -> np.ndarray:
    """Logits after each of the tokens, float32 [tokens, vocab]."""
    sequence = engine.sequence() if sequence is None else sequence
    rows = [Row(sequence, first + i, token) for i, token in enumerate(tokens)]
    out = []
    for start in range(0, len(rows), MAX_ROWS):
        part = rows[start : start + MAX_ROWS]
        out += [found.logits for found in engine.step(part, range(len(part)), Reduction.ALL)]
    return np.array(out)
