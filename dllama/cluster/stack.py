"""One node of a cluster in the place of PrivateLoRA's cloud: it works its slice of the stack for edges' passages."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np

from dllama.cluster import wire
from dllama.cluster.all_reduce import AllReduce
from dllama.cluster.job import Job
from dllama.cluster.mesh import Mesh
from dllama.cluster.rounds import Form
from dllama.engine.adapters import N_TARGETS, NO_ADAPTER
from dllama.engine.kv_cache import KVCache
from dllama.engine.workspace import MAX_ROWS, Place
from dllama.formats import FloatType
from dllama.privatelora.adapter import CloudAdapter
from dllama.privatelora.backends.cpu import CpuBackend
from dllama.privatelora.frozen_weights import MOST_ADAPTERS
from dllama.privatelora.passage import Passage, Stop
from dllama.privatelora.shape import AdapterShape


class StackSums:
    """Sums over the nodes of what each has a part of: see `Sums`. Those of A·x are exchanged as F32, whatever the
    buffers' type: they are few, and edges have their own form for them.
    """

    def __init__(self, job: Job, mesh: Mesh):
        self._job, self._mesh, self._step = job, mesh, 0
        self._y = job.exchange(mesh)
        self._low: dict[int, AllReduce] = {}  # by width

    def begin(self, step: int) -> None:
        """The sums that follow belong to this step; parts of A·x to the number after it."""
        self._step = step
        self._y.begin(step)

    def y(self, x: int, stride: int, rows: int) -> None:
        """Raises NodeLost."""
        self._y(x, stride, rows)

    def low(self, x: int, stride: int, rows: int, width: int) -> None:
        """Raises NodeLost."""
        if width not in self._low:
            job = self._job
            form = Form.MESH if job.form is Form.SCATTER else job.form
            spans = [range(width)] * len(job.shares)
            how = form, job.order, FloatType.F32, job.epoch, MAX_ROWS
            self._low[width] = AllReduce(self._mesh, job.index, spans, *how)
        self._low[width].begin(self._step + 1)
        self._low[width](x, stride, rows)


class StackMember:
    """Runs a node's job for a stack, with its weights and its links to the other nodes. The root's sequences, passages
    and adapters are known by their numbers.
    """

    def __init__(self, job: Job, backend: CpuBackend, mesh: Mesh):
        self.mesh = mesh
        self._backend, self._epoch = backend, job.epoch
        self._sums = StackSums(job, mesh) if len(job.shares) > 1 else None
        self._sequences: dict[int, KVCache] = {}
        self._passages: dict[int, tuple[Passage, Stop]] = {}  # and where they are
        self._adapters: dict[int, tuple[int, int]] = {}  # the backend's number, and the rank of answers
        self._loading: dict[int, Future] = {}
        self._loader = ThreadPoolExecutor(1, "dllama-adapters")

    # --- passes ---

    def run(
        self, message: wire.Pass, payload: memoryview, send: Callable[[Sequence[np.ndarray]], None] = lambda lows: None
    ) -> list[np.ndarray] | None:
        """A pass; where it leaves the layers the residual streams, as of `Backend.finish`. ``send``: see `Backend.run`.

        Raises NodeLost, and ValueError or ModelError for what no sound root asks for.
        """
        for number in message.freed:
            self._sequences.pop(number, None)
        for number in message.ended:
            self._passages.pop(number, None)
        start, stop = Stop(*message.start), Stop(*message.stop)
        enters, leaves = start.product < 0, stop.product < 0
        self._check(start, stop)
        values = np.frombuffer(payload, "<f4")
        passages = self._entering(message, values) if enters else self._answered(message, start, values)
        if self._sums is not None:
            self._sums.begin(message.step)
        came_from = start.layer if enters else start
        numbers = [number for number, _, _ in message.passages]
        for number in numbers:
            self._passages.pop(number, None)  # what ends in the middle cannot be taken on
        if leaves:
            return self._backend.finish(passages, came_from, stop.layer, self._sums)
        self._backend.run(passages, came_from, stop, send, self._sums)
        self._passages |= {number: (passage, stop) for number, passage in zip(numbers, passages, strict=True)}
        return None

    def _check(self, start: Stop, stop: Stop) -> None:
        first = start.layer * 4 + start.product + 1 if start.product >= 0 else start.layer * 4
        last = stop.layer * 4 + max(stop.product, 0)
        end = 4 * self._backend.n_layers
        if not first <= last <= end or (stop.product >= 0 and last == end):
            raise ValueError(f"a pass from {tuple(start)} to {tuple(stop)}")

    def _entering(self, message: wire.Pass, x: np.ndarray) -> list[Passage]:
        count = sum(count for _, _, count, _ in message.rows)
        if not 0 < count <= MAX_ROWS or count != sum(count for _, _, count in message.passages):
            raise ValueError(f"{count} rows, of 1 to {MAX_ROWS}, or not as many as its passages have")
        places = [place for run in message.rows for place in self._places(*run)]
        x = _rows(x, count, self._backend.config.dim)
        passages, done = [], 0
        for _, adapter, rows in message.passages:
            span = slice(done, done + rows)
            passages.append(Passage(places[span], self._slot(adapter)[0], x[span]))
            done += rows
        return passages

    def _answered(self, message: wire.Pass, start: Stop, values: np.ndarray) -> list[Passage]:
        passages, done = [], 0
        for number, adapter, rows in message.passages:
            passage, at = self._passages.get(number, (None, None))
            slot, rank = self._slot(adapter)
            if at != start or passage in passages or rows != len(passage.places) or slot != passage.adapter:
                raise ValueError(f"passage {number}: it is not there")
            shape = rows, N_TARGETS[start.product], rank
            size = int(np.prod(shape))
            passage.answer = _rows(values[done : done + size], *shape)
            done += size
            passages.append(passage)
        if not passages or done != len(values):
            raise ValueError(f"{4 * len(values)} bytes of answers, and {4 * done} are due")
        return passages

    def _places(self, sequence: int, first: int, count: int, context: int) -> list[Place]:
        if context > self._backend.config.seq_len:
            raise ValueError(f"a context of {context} tokens, and the model's is {self._backend.config.seq_len}")
        cache = self._sequences.get(sequence)
        if cache is None:
            cache = self._sequences[sequence] = self._backend.sequence(context)
        return [Place(cache, position) for position in range(first, first + count)]

    def _slot(self, adapter: int) -> tuple[int, int]:
        """The backend's number for an adapter, and the rank of its answers."""
        if adapter == NO_ADAPTER:
            return NO_ADAPTER, 0
        if adapter not in self._adapters:
            raise ValueError(f"adapter {adapter}: it is not there")
        return self._adapters[adapter]

    # --- adapters ---

    def load(self, number: int, adapter: CloudAdapter, layers: range) -> None:
        """Makes its slice of A and B. From any thread; raises as `Backend.add`."""
        self._adapters[number] = self._backend.add(adapter, layers), adapter.shape.r_d2c

    def remove(self, number: int) -> None:
        """Frees an adapter, if it is there."""
        slot, _ = self._adapters.pop(number, (None, None))
        if slot is not None:
            self._backend.remove(slot)

    def adapt(self, message: wire.Adapt) -> None:
        """Begins to do as the root says, in another thread. Raises ValueError where there is too much of it."""
        if message.adapter is None:
            self._loader.submit(self.remove, message.number)
        elif len(self._loading) == MOST_ADAPTERS or message.number in self._loading | self._adapters:
            raise ValueError(f"adapter {message.number}: there is one of that number, or too many are being made")
        else:
            self._loading[message.number] = self._loader.submit(self._make, message.number, message.adapter)

    @property
    def is_loading(self) -> bool:
        """Whether adapters are being made."""
        return bool(self._loading)

    def adapted(self) -> Iterator[wire.Adapted]:
        """What has become of those that are done."""
        for number, made in list(self._loading.items()):
            if made.done():
                del self._loading[number]
                error = made.exception()
                problem = None if error is None else wire.line(str(error) or type(error).__name__)
                yield wire.Adapted(self._epoch, number, problem)

    def _make(self, number: int, wanted: dict) -> None:
        """Raises ValueError and AdapterError for what no sound root asks for, and as ``load``."""
        config = self._backend.config
        shape = AdapterShape.of(config, wanted["r_c2d"], wanted["r_d2c"], wanted["targets"], wanted["layers"])
        adapter = CloudAdapter(shape, wanted["seed"])
        adapter.check(config)
        self.load(number, adapter, range(*wanted["worked"]))

    def close(self) -> None:
        """Makes no more adapters than the one that is at work."""
        self._loader.shutdown(wait=False, cancel_futures=True)


def _rows(values: np.ndarray, *shape: int) -> np.ndarray:
    """float32 of this shape. ValueError where they are not as many."""
    return values.astype(np.float32, copy=False).reshape(shape)
