"""Clouds, in processes of their own or in a thread of this one, and edges that talk to them."""

import itertools
import os
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from dllama import Llama, SamplerSettings
from dllama.engine.candidates import Reduction
from dllama.engine.interface import Row
from dllama.formats import FloatType, ModelFile
from dllama.kernels import tags
from dllama.kernels.team import Team
from dllama.privatelora.backends.cpu import CpuBackend
from dllama.privatelora.backends.open import open_backend
from dllama.privatelora.cloud import Cloud, CloudSettings
from dllama.privatelora.edge import EdgeEngine
from dllama.privatelora.settings import EdgeSettings
from tests.cluster.nodes import say
from tests.cluster.processes import Process, eventually

TURN_SECONDS = 0.02
EXACT = ("f32", "f16")
"""Types of activations and cache, for the embedded model."""
GREEDY = SamplerSettings(temperature=0)


def cloud(
    model: str,
    port: int = 0,
    nthreads: int = 1,
    device: str = "cpu",
    types=("f32", "f32"),
    loading_seconds: float = 0.0,
    **options,
) -> None:
    """A cloud, with these of the `CloudSettings`; says its port, and what happens. It takes ``loading_seconds`` longer
    to load its model."""
    make = open_backend(device, nthreads, *map(FloatType.parse, types), say)

    def backend(model, progress):
        say("loading")
        time.sleep(loading_seconds)
        return make(model, progress)

    node = Cloud(CloudSettings("127.0.0.1", port, options.pop("key", None), nthreads, model, **options), backend, say)
    say(str(node.port))
    node.serve()


class CloudProcess(Process):
    """A live cloud. ``options``: those of ``cloud``."""

    def __init__(self, model: str | os.PathLike, **options):
        super().__init__(cloud, str(model), **options)

    def restart(self) -> None:
        """Starts it again on the port that it had."""
        self.close()
        self.options["port"] = self.port
        self._start()
        assert self.address


class WatchedBackend(CpuBackend):
    """Notes what a cloud asks of it.

    groups: the rows of each passage, for each call that took passages on;  adapters: the numbers of those that are
    loaded;  caches: of all sequences there were, as long as somebody holds them
    before: is called before passages are taken on
    """

    def __init__(self, model: ModelFile):
        super().__init__(model, Team(1), tags.F32, tags.F32)
        self.groups: list[list[int]] = []
        self.adapters: set[int] = set()
        self.caches = weakref.WeakSet()
        self.before: Callable[[], None] = lambda: None

    def sequence(self, context):
        cache = super().sequence(context)
        self.caches.add(cache)
        return cache

    def add(self, adapter, layers):
        number = super().add(adapter, layers)
        self.adapters.add(number)
        return number

    def remove(self, number):
        super().remove(number)
        self.adapters.remove(number)

    def run(self, passages, *args):
        self.groups.append([len(passage.places) for passage in passages])
        self.before()
        super().run(passages, *args)

    def finish(self, passages, *args):
        self.groups.append([len(passage.places) for passage in passages])
        self.before()
        return super().finish(passages, *args)


class CloudThread:
    """A cloud in a thread of this process. ``lines``: what it has said so far; ``backend``: see `WatchedBackend`."""

    def __init__(self, model: str | os.PathLike, **options):
        self.lines: list[str] = []
        settings = CloudSettings("127.0.0.1", 0, None, 1, model, **options)
        self._cloud = Cloud(settings, self._open, self.lines.append)
        self.address = f"127.0.0.1:{self._cloud.port}"
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    def said(self, words: str, since: int = 0) -> None:
        """Waits until it says so, in a line after the first ``since`` ones."""
        eventually(lambda: any(words in line for line in self.lines[since:]), lambda: f"{words!r} not in {self.lines}")

    def _open(self, model: ModelFile, progress) -> WatchedBackend:
        self.backend = WatchedBackend(model)
        return self.backend

    def _serve(self) -> None:
        while not self._ended.is_set():
            self._cloud.turn(TURN_SECONDS)

    def __enter__(self) -> "CloudThread":
        return self

    def __exit__(self, *_) -> None:
        self._ended.set()
        self._thread.join()
        self._cloud.close()


@contextmanager
def edge(
    model: ModelFile, address: str, notify: Callable[[str], None] = lambda line: None, types=("f32", "f32"), **options
) -> Iterator[EdgeEngine]:
    """An edge's engine. ``options``: those of `EdgeSettings`."""
    settings = EdgeSettings(address, options.pop("key", None), **{"form": "f32", **options})
    team = Team(1)
    try:
        engine = EdgeEngine(
            model, team, model.config.seq_len, *map(FloatType.parse, types), settings, notify, lambda *_: None
        )
        try:
            yield engine
        finally:
            engine.close()
    finally:
        team.close()


def run(engine, tokens, sequence=None, first: int = 0) -> np.ndarray:
    """Logits after each of the tokens, float32 [tokens, vocab]."""
    sequence = engine.sequence() if sequence is None else sequence
    rows = [Row(sequence, first + i, token) for i, token in enumerate(tokens)]
    out = []
    for start in range(0, len(rows), engine.most_rows):
        part = rows[start : start + engine.most_rows]
        out += [found.logits.copy() for found in engine.step(part, range(len(part)), Reduction.ALL)]
    return np.array(out)


def endless_edge(model: str, adapter: str, address: str) -> None:
    """Runs one token after another, and says so."""
    with edge(ModelFile(Path(model)), address, adapter=adapter) as engine:
        sequence = engine.sequence()
        for position in itertools.cycle(range(engine.context)):
            run(engine, [1], sequence, position)
            say(f"position {position}")


def open_llama(address: str, notify: Callable[[str], None] = lambda line: None, **options) -> Llama:
    """The embedded model with this cloud, one of ``EXACT``. ``options``: those of `EdgeSettings`, and kv_float_type."""
    types = {"buffer_float_type": "f32", "kv_float_type": options.pop("kv_float_type", "f16")}
    settings = EdgeSettings(address, options.pop("key", None), **{"form": "f32", **options})
    return Llama(nthreads=1, **types, private=settings, notify=notify)


def write(llama: Llama, prompt, steps: int, sampler: SamplerSettings = GREEDY, fault: Callable = lambda: None) -> str:
    """The text that it generates; ``fault`` happens in the middle."""
    text = ""
    for number, piece in enumerate(llama.generate(prompt, steps, sampler), 1):
        text += piece.text
        if number == steps // 2:
            fault()
    return text
