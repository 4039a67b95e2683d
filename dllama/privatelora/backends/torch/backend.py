"""A decoder stack on torch that stops for the edges: see `Backend`."""

from __future__ import annotations

import re
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate
from weakref import WeakSet, ref

import numpy as np
import torch

from dllama.engine import memory
from dllama.engine.memory import in_units
from dllama.engine.weights import Source
from dllama.engine.workspace import MAX_ROWS
from dllama.errors import ModelError, OutOfMemoryError
from dllama.kernels.jit import compiled
from dllama.kernels.libzmq import AVAILABLE
from dllama.kernels.talk import example, talk_at
from dllama.kernels.team import in_threads
from dllama.privatelora.adapter import CloudAdapter
from dllama.privatelora.backends.torch import pages
from dllama.privatelora.backends.torch.adapters import Adapters
from dllama.privatelora.backends.torch.plan import Plan
from dllama.privatelora.backends.torch.recorder import Recorder
from dllama.privatelora.backends.torch.stack import Stack
from dllama.privatelora.backends.torch.staging import Staging
from dllama.privatelora.backends.torch.weights import PACKED
from dllama.privatelora.passage import PRODUCTS, Passage, Stop
from dllama.privatelora.shape import MAX_RANK
from dllama.privatelora.short_way import EdgeTalk, ShortWay

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}
MOST_LOW = MAX_ROWS * max(map(len, PRODUCTS)) * MAX_RANK


class TorchBackend:
    """See `Backend`.

    device: "cuda" or "cpu", which has been looked for
    weights: one of DTYPES, the matrices' and the products'; None keeps Q40 and Q80 packed, and works in F16 on CUDA
    and in F32 on the CPU

    Raises OutOfMemoryError where the layers do not fit.
    """

    has_short_ways = AVAILABLE

    def __init__(
        self,
        source: Source,
        device: str,
        weights: str | None = None,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.config = source.config
        self._device = torch.device(device)
        self._cuda = self._device.type == "cuda"
        dtype = DTYPES[weights or ("f16" if self._cuda else "f32")]
        packed = weights is None and self.config.weight_type in PACKED
        form = self.config.weight_type.name if packed else str(dtype).removeprefix("torch.")
        name = torch.cuda.get_device_name() if self._cuda else f"cpu, {in_threads(torch.get_num_threads())}"
        self.device = f"{name}, torch, {form} weights"
        _check_fits(self.device, _free_bytes(self._cuda), Stack.nbytes(source, dtype, packed))
        with self._memory_told("loading the layers"):
            self._stack = Stack(source, dtype, packed, self._device, progress)
            self._low, self._answers = (Staging(MOST_LOW, self._device) for _ in range(2))
            self._x = Staging(MAX_ROWS * self.config.dim, self._device)
        self._lock = threading.RLock()  # of whoever captures, or uses the device from another thread
        self._adapters = Adapters(self.config, dtype, self._device, self._lock)
        self._recorder = Recorder(self._device)
        self._moves = self._stack.pool.moves
        self._low_is_here = torch.cuda.Event() if self._cuda else None
        self._sequences: WeakSet[pages.Sequence] = WeakSet()
        self._here: list[tuple[ref[Passage], slice]] = []  # whose values the buffers hold, and in which rows
        self._plan: Plan | None = None  # theirs
        self._ranks = 0, 0  # its adapters' largest
        self._talk_at = compiled(talk_at, 0, example()) if AVAILABLE else None

    def prepare(self) -> None:
        """It always is."""

    def sequence(self, context: int) -> pages.Sequence:
        sequence = pages.Sequence(self._stack.pool, context)
        self._sequences.add(sequence)
        return sequence

    def sequence_bytes(self, context: int) -> int:
        return self._stack.pool.nbytes(context)

    def free_bytes(self) -> int | None:
        free, pool = _free_bytes(self._cuda), self._stack.pool
        if free is None:
            return None
        missing = sum(pool.nbytes(s.capacity) - pool.page_bytes * len(s.pages) for s in self._sequences)
        return free + pool.free_bytes() - missing

    def add(self, adapter: CloudAdapter, layers: range) -> int:
        with self._memory_told("loading an adapter"):
            return self._adapters.add(adapter, layers)

    def remove(self, number: int) -> None:
        with self._lock:
            self._recorder.forget()
            self._stack.planner.forget()
            self._adapters.remove(number)

    @torch.inference_mode()
    def run(
        self,
        passages: Sequence[Passage],
        came_from: Stop | int,
        to: Stop,
        send: Callable[[Sequence[np.ndarray]], None],
    ) -> None:
        with self._memory_told("a pass"), self._lock:
            plan = self._begin(passages, came_from)
        self._to_stop(plan, came_from, to, lambda low: send([low[span] for _, span in self._here]))
        for passage in passages:
            passage.state = to.product, None

    @torch.inference_mode()
    def finish(self, passages: Sequence[Passage], came_from: Stop | int, layer: int) -> list[np.ndarray]:
        with self._memory_told("a pass"), self._lock:
            plan = self._begin(passages, came_from)
            self._recorder.run(plan.key and (plan.key, came_from, layer), partial(self._leave, plan, came_from, layer))
            here, self._here = self._here, []
            return [self._stack.buffers.x[span].numpy(force=True).copy() for _, span in here]

    def short_way(self, edges: Sequence[EdgeTalk]) -> ShortWay:
        return ShortWay(edges, blocks=True)

    @torch.inference_mode()
    def go(self, passages: Sequence[Passage], came_from: Stop | int, way: ShortWay) -> None:
        with self._memory_told("a pass"), self._lock:
            plan = self._begin(passages, came_from)
        for to in way.ahead:
            self._to_stop(plan, came_from, to, lambda low, to=to: self._talk_at(to.half, way.arguments(low)))
            answers, came_from = self._answers[self._answers_shape(plan, to)], to
            answers.array[:] = 0
            if self._talk_at(to.half + 1, way.arguments(answers.array)):
                break
            answers.upload()
        for passage, (_, span), answered in zip(passages, self._here, way.answered, strict=True):
            passage.state = came_from.product, None
            if answered:  # it is put away with the passage, should another be first
                passage.answer = answers.array[span].copy()

    def _to_stop(self, plan: Plan, came_from: Stop | int, to: Stop, send: Callable[[np.ndarray], None]) -> None:
        """A·x, for ``send``, float32 [rows, targets of the product, ranks], and the product itself, which on CUDA is
        begun before that."""
        multiply = partial(self._recorder.run, plan.key and (plan.key, to), partial(self._stack.multiply, plan, *to))
        with self._memory_told("a pass"), self._lock:
            advance = partial(self._advance, plan, came_from, to)
            self._recorder.run(plan.key and (plan.key, came_from, to), advance)
            low = self._low[self._low_shape(plan, to)]
            low.download()
            if self._cuda:
                self._low_is_here.record()
                multiply()
                self._low_is_here.synchronize()
        send(low.array)
        if not self._cuda:
            with self._memory_told("a pass"), self._lock:
                multiply()

    # --- halves of products, which may be captured ---

    def _advance(self, plan: Plan, came_from: Stop | int, to: Stop) -> None:
        """From behind a product, or from the layer entered, to the input of another product and its A·x."""
        first, last = self._after(plan, came_from), 4 * to.layer + to.product
        self._layers(plan, first, last)
        self._stack.make_input(plan, *to)
        x = self._stack.buffers.inputs[to.product][: plan.n_rows]
        self._adapters.shrink(plan, to, x, self._low[self._low_shape(plan, to)].device)

    def _leave(self, plan: Plan, came_from: Stop | int, layer: int) -> None:
        self._layers(plan, self._after(plan, came_from), 4 * layer)
        self._stack.residual(plan)

    def _after(self, plan: Plan, came_from: Stop | int) -> int:
        """The edges' answers added to the product that left for them; the number of the next."""
        if isinstance(came_from, int):
            return 4 * came_from
        answers = self._answers[self._answers_shape(plan, came_from)].device
        out = self._stack.buffers.left[came_from.product][: plan.n_rows]
        self._adapters.expand(plan, came_from, answers, out)
        return 4 * came_from.layer + came_from.product + 1

    def _layers(self, plan: Plan, first: int, last: int) -> None:
        for number in range(first, last):
            self._stack.make_input(plan, *divmod(number, 4))
            self._stack.multiply(plan, *divmod(number, 4))

    # --- what comes in ---

    def _begin(self, passages: Sequence[Passage], came_from: Stop | int) -> Plan:
        """The passages' values and answers in the buffers."""
        if [passage() for passage, _ in self._here] != list(passages):
            self._put_away()
            self._take_in(passages)
        if isinstance(came_from, Stop):
            self._take_answers(passages, came_from)
        return self._plan

    def _take_answers(self, passages: Sequence[Passage], stop: Stop) -> None:
        answers = self._answers[self._answers_shape(self._plan, stop)]
        answers.array[:] = 0
        for passage, (_, span) in zip(passages, self._here, strict=True):
            if passage.answer is not None:
                _, targets, rank = passage.answer.shape
                answers.array[span, :targets, :rank] = passage.answer
                passage.answer = None
        answers.upload()

    def _take_in(self, passages: Sequence[Passage]) -> None:
        self._here = []
        places = [place for passage in passages for place in passage.places]
        if not 0 < len(places) <= MAX_ROWS:
            raise ValueError(f"{len(places)} rows, and a step takes 1 to {MAX_ROWS}")
        self._give_pages(places)
        self._plan = self._stack.planner.plan(places, [passage.adapter for passage in passages for _ in passage.places])
        self._ranks = self._adapters.ranks(self._plan)
        buffers, x = self._stack.buffers, self._x[len(places), self.config.dim]
        for tensor in (buffers.x, *buffers.left):
            tensor[: self._plan.n_rows].zero_()
        for passage, span in zip(passages, _spans(passages), strict=True):
            if passage.x is not None:
                x.array[span] = passage.x
                buffers.x[span].copy_(x.here[span], non_blocking=True)
                passage.x = None
            else:
                product, (x, out) = passage.state
                buffers.x[span], buffers.left[product][span] = x, out
        self._here = list(zip(map(ref, passages), _spans(passages), strict=True))

    def _give_pages(self, places: Sequence) -> None:
        wanted: dict[pages.Sequence, int] = {}
        for sequence, position in places:
            if not 0 <= position < sequence.capacity:
                raise ModelError(f"position {position} is outside the context of {sequence.capacity} tokens")
            wanted[sequence] = max(wanted.get(sequence, 0), position + 1)
        try:
            self._stack.pool.reserve(wanted)
        finally:
            if self._moves != self._stack.pool.moves:
                self._recorder.forget()
                self._moves = self._stack.pool.moves

    def _put_away(self) -> None:
        """Others need the buffers now."""
        for passage, span in self._here:
            passage = passage()
            if passage is not None and passage.state is not None:
                product, _ = passage.state
                left = self._stack.buffers.left[product]
                passage.state = product, (self._stack.buffers.x[span].clone(), left[span].clone())

    # --- memory ---

    def _low_shape(self, plan: Plan, stop: Stop) -> tuple[int, int, int]:
        return plan.n_rows, len(PRODUCTS[stop.product]), self._ranks[0]

    def _answers_shape(self, plan: Plan, stop: Stop) -> tuple[int, int, int]:
        return plan.n_rows, len(PRODUCTS[stop.product]), self._ranks[1]

    @contextmanager
    def _memory_told(self, what: str) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            if not isinstance(error, torch.OutOfMemoryError) and "DefaultCPUAllocator" not in str(error):
                raise
            tried, free = re.search(r"ried to allocate ([\d.]+ \w+)", str(error)), _free_bytes(self._cuda)
            raise OutOfMemoryError(
                f"{self.device}: out of memory in {what}: {tried[1] if tried else 'more'} asked for, "
                f"{'?' if free is None else in_units(free)} free"
            ) from None


def _free_bytes(cuda: bool) -> int | None:
    """What is left of memory, with what torch keeps for itself. None where the system does not say."""
    if not cuda:
        return memory.available_bytes()
    return torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()


def _check_fits(device: str, free: int | None, needed: int) -> None:
    if free is not None and needed > free:
        raise OutOfMemoryError(
            f"{in_units(needed)} of memory needed for the layers on {device}, {in_units(free)} free: "
            "take a smaller model, or one in Q40"
        )


def _spans(passages: Sequence[Passage]) -> list[slice]:
    """The rows of each."""
    ends = list(accumulate(len(passage.places) for passage in passages))
    return [slice(end - len(passage.places), end) for passage, end in zip(passages, ends, strict=True)]
