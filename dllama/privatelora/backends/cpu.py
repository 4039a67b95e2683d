"""The cloud's layers on this machine's CPU, with the engine's own kernels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate
from typing import Protocol
from weakref import WeakKeyDictionary, ref

import numpy as np

from dllama.engine.adapter_weights import NUMBERS
from dllama.engine.adapters import DOWN, N_TARGETS, OUT, UP
from dllama.engine.halves import LEAVE, run_halves
from dllama.engine.kv_cache import KVCache
from dllama.engine.memory import available_bytes
from dllama.engine.shape import NodeShape
from dllama.engine.stages import ROW
from dllama.engine.weights import Source
from dllama.engine.workspace import ALWAYS, Workspace
from dllama.kernels import jit, tags
from dllama.kernels.jit import compiled
from dllama.kernels.libzmq import AVAILABLE
from dllama.kernels.talk import example
from dllama.kernels.team import Team, in_threads
from dllama.privatelora.adapter import CloudAdapter
from dllama.privatelora.frozen_weights import FrozenWeights
from dllama.privatelora.passage import Passage, Stop
from dllama.privatelora.short_way import EdgeTalk, ShortWay

SPLIT = {OUT: "o", DOWN: "down"}
"""Products of whose inputs the nodes of a cluster have a part each, and their targets: so A·x and the product are
summed over the nodes."""


class Sums(Protocol):
    """Sums over all nodes of a cluster, in place of each node's part: rows of floats at an address, ``stride`` bytes
    apart. What they raise ends the pass."""

    def y(self, x: int, stride: int, rows: int) -> None:
        """Of a product, [rows, dim]."""

    def low(self, x: int, stride: int, rows: int, width: int) -> None:
        """Of A·x, [rows, width]."""


class CpuBackend(Workspace):
    """See `Backend`. ``act``, ``cache``: as in `Workspace`. A node of a cluster has a slice for a source; ``shape``:
    the slice's; ``slices``: rows and columns that it has of each kind of the model's matrices. Its passes need
    ``sums``.
    """

    def __init__(
        self,
        source: Source,
        team: Team,
        act: tags.Tag,
        cache: tags.Tag,
        progress: Callable[[int, int], None] = lambda done, total: None,
        shape: NodeShape | None = None,
        slices: Mapping[str, tuple[range, range]] | None = None,
    ):
        config = source.config
        super().__init__(source, team, act, cache, config.seq_len, progress, shape, ends=False, low_width=config.dim)
        self.device = f"cpu, {in_threads(team.nthreads)}, {jit.ISA.name} kernels"
        form = tags.F32 if act is tags.F32 else tags.F16
        self._frozen = FrozenWeights(config, form, slices)
        self._with = self.weights.layers, self.weights.experts, self._frozen.records, form
        self._silent = None if slices is not None else example()  # nobody talks to a node of a cluster
        self.has_short_ways = self._silent is not None and AVAILABLE
        self._table_now = np.zeros(1, ROW)
        self._run_halves = compiled(run_halves, 0, *self._args(self._silent), 0, 0)
        parts = (OUT, UP) if config.arch.has_experts else (OUT, DOWN)
        self._parts = {2 * product + 1 for product in parts}  # halves of a layer that leave a part of a sum in y
        self._here: list[tuple[ref[Passage], slice]] = []  # whose values the buffers hold, and in which rows
        self._written: WeakKeyDictionary[KVCache, int] = WeakKeyDictionary()  # positions of each sequence, so far

    def prepare(self) -> None:
        """It always is."""

    def sequence(self, context: int) -> KVCache:
        sequence = self.sequence_of(context)
        self._written[sequence] = 0
        return sequence

    def free_bytes(self) -> int | None:
        available = available_bytes()
        if available is None:
            return None
        # The system gives memory as it is written.
        return available - sum(self.sequence_bytes(s.capacity - written) for s, written in self._written.items())

    def sequence_bytes(self, context: int) -> int:
        return context * 2 * self.n_layers * self.shape.n_kv_heads * int(self._step["cache_row"][0])

    def add(self, adapter: CloudAdapter, layers: range) -> int:
        return self._frozen.add(adapter, layers)

    def remove(self, number: int) -> None:
        self._frozen.remove(number)

    def run(
        self,
        passages: Sequence[Passage],
        came_from: Stop | int,
        to: Stop,
        send: Callable[[Sequence[np.ndarray]], None],
        sums: Sums | None = None,
    ) -> None:
        first, last = self._begin(passages, came_from), to.half
        args = self._args(self._silent)
        with self.team.led(self._run_halves, *args, 0, ALWAYS):
            self._work(args, first, last + 1, sums)
            if sums is not None and to.product in SPLIT:
                self._sum_low(to, sums)
            send([self._low[span, : N_TARGETS[to.product]] for span in _spans(passages)])
            self._work(args, last + 1, last + 2, sums)
        for passage in passages:
            passage.state = to.product, None

    def finish(
        self, passages: Sequence[Passage], came_from: Stop | int, layer: int, sums: Sums | None = None
    ) -> list[np.ndarray]:
        first = self._begin(passages, came_from)
        args = self._args(self._silent)
        with self.team.led(self._run_halves, *args, 0, ALWAYS):
            self._work(args, first, 8 * layer, sums)
            self._run_halves(0, *args, LEAVE + layer, LEAVE + layer + 1)
        self._here = []
        return [self._x[span, : self.config.dim].copy() for span in _spans(passages)]

    def short_way(self, edges: Sequence[EdgeTalk]) -> ShortWay:
        return ShortWay(edges, blocks=self.team.nthreads == 1)

    def go(self, passages: Sequence[Passage], came_from: Stop | int, way: ShortWay) -> None:
        first = self._begin(passages, came_from)
        args = self._args(way.arguments(self._low))
        with self.team.led(self._run_halves, *args, 0, ALWAYS):
            self._run_halves(0, *args, first, way.stops[-1].half + 2)
        product = way.at.product
        for passage, span, answered in zip(passages, _spans(passages), way.answered, strict=True):
            passage.state = product, None
            if answered:  # it is put away with the passage, should another be first
                passage.answer = self._low[span, : N_TARGETS[product]].copy()

    def _args(self, talk: tuple | None) -> tuple:
        return *self._formats, self._step, *self._with, talk, self._table_now

    def _work(self, args: tuple, first: int, last: int, sums: Sums | None) -> None:
        """Halves ``first`` up to ``last``, and the sums over all nodes of what they leave parts of."""
        for half in range(first, last) if sums is not None else ():
            if half % 8 in self._parts:
                self._run_halves(0, *args, first, half + 1)
                sums.y(int(self._step["y"][0]), int(self._step["x_stride"][0]), len(self._table_now))
                first = half + 1
        self._run_halves(0, *args, first, last)

    def _sum_low(self, stop: Stop, sums: Sums) -> None:
        ranks = self._frozen.records["a_rank"][self._table_now["adapter"], stop.layer, NUMBERS[SPLIT[stop.product]]]
        if ranks.any():  # a pass may stop where no adapter is, though no sound root asks for it
            sums.low(int(self._step["low"][0]), int(self._step["low_stride"][0]), len(ranks), int(ranks.max()))

    def _begin(self, passages: Sequence[Passage], came_from: Stop | int) -> int:
        """The passages' values and answers in the buffers, and which half comes next."""
        if [passage() for passage, _ in self._here] != list(passages):
            self._put_away()
            self._take_in(passages)
        for passage, span in zip(passages, _spans(passages), strict=True):
            if passage.answer is not None:
                _, targets, rank = passage.answer.shape
                self._low[span, :targets, :rank] = passage.answer
                passage.answer = None
        return 8 * came_from if isinstance(came_from, int) else came_from.half + 2

    def _take_in(self, passages: Sequence[Passage]) -> None:
        places = [place for passage in passages for place in passage.places]
        self._table_now = self._table(places, ())
        for passage, span in zip(passages, _spans(passages), strict=True):
            self._table_now["adapter"][span] = passage.adapter
            if passage.x is not None:
                for sequence, position in passage.places:
                    if position >= self._written.get(sequence, position + 1):
                        self._written[sequence] = position + 1
                self._x[span, : self.config.dim], self._y[span] = passage.x, 0
                passage.x = None
            else:
                product, (x, out) = passage.state
                self._x[span], self._left_by(product)[span] = x, out
        self._here = list(zip(map(ref, passages), _spans(passages), strict=True))

    def _put_away(self) -> None:
        """Others need the buffers now."""
        for passage, span in self._here:
            passage = passage()
            if passage is not None and passage.state is not None:
                product, _ = passage.state
                passage.state = product, (self._x[span].copy(), self._left_by(product)[span].copy())

    def _left_by(self, product: int) -> np.ndarray:
        """What a product has written."""
        return (self._qkv, self._y, self._hidden, self._y)[product]


def _spans(passages: Sequence[Passage]) -> list[slice]:
    """The rows of each."""
    ends = list(accumulate(len(passage.places) for passage in passages))
    return [slice(end - len(passage.places), end) for passage, end in zip(passages, ends, strict=True)]
