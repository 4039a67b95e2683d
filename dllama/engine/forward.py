"""The forward pass: rows of (sequence, position, token) in, logits out.

Prefill, decoding, several sequences at once and the check of draft tokens are all the same call: rows in any number,
each seeing the positions of its own sequence up to its own, those of the same call included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dllama.engine import experts, rope
from dllama.engine.adapter_weights import AdapterWeights
from dllama.engine.adapters import MOST_TARGETS, NO_ADAPTER
from dllama.engine.interface import Row
from dllama.engine.kv_cache import KVCache
from dllama.engine.segments import run_segments
from dllama.engine.shape import NodeShape
from dllama.engine.stages import ROW, STEP, TILE
from dllama.engine.weights import Source, Weights, padded
from dllama.errors import ModelError
from dllama.formats import Activation, RopeType
from dllama.kernels import tags
from dllama.kernels.attention import HEADS, cache_row_bytes
from dllama.kernels.elementwise import acts_stride
from dllama.kernels.jit import compiled
from dllama.kernels.team import Team

MAX_ROWS = 128
"""Rows of one call; longer prompts take several."""
ALIGN = 64
ALWAYS = 1 << 30
"""More segments than any model has: helpers of a led step go on until they are stopped."""


class Place(NamedTuple):
    """Where a row belongs: what a `Row` says but for the token, which nodes other than the root never see."""

    sequence: KVCache
    position: int


Exchange = Callable[[int, int, int], None]
"""Turns a node's parts of a segment's output into the sums of all nodes' parts, in place: float32 [rows, dim], given by
address, bytes from one row to the next (which are padded to 32 values), and number of rows."""


class Forward:
    """One model, or a node's slice of it: its weights, its threads, and the buffers of a step.

    ``act``: F32 or Q80, what the inputs of products are rounded to; ``cache``: F16, F32 or Q80, the KV caches' format;
    ``shape``: the slice's; without it the source is a whole model; ``adapters``: those that sequences may have.
    """

    def __init__(
        self,
        source: Source,
        team: Team,
        act: tags.Tag,
        cache: tags.Tag,
        context: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
        shape: NodeShape | None = None,
        adapters: AdapterWeights | None = None,
    ):
        self.source, self.config, self.team, self.cache, self.context = source, source.config, team, cache, context
        self.shape = shape or NodeShape.whole(self.config)
        self._embedding = source.f32("embedding") if shape is None else None
        self.weights = Weights(source, act, team, progress)
        self._formats = self.weights.tag, act, cache
        self.adapters = adapters
        records = None if adapters is None else adapters.records
        self._layers = self.weights.layers, self.weights.experts, records
        self._frequencies = rope.frequencies(self.config)
        self._step = np.zeros(1, STEP)
        self._buffers = []
        self._logits = None
        self._allocate(act)
        args = *self._formats, self._step, *self._layers, np.zeros(1, ROW)
        self._run_segments = compiled(run_segments, 0, *args, 0, 0)

    def sequence(self, adapter: int = NO_ADAPTER) -> KVCache:
        """An empty sequence. ``adapter``: the number of one of the adapters, whose values its rows add."""
        return KVCache(self.config, self.shape.n_kv_heads, self.context, self.cache, adapter)

    def forward(self, rows: Sequence[Row], wanted: Sequence[int] | None = None) -> np.ndarray:
        """`step` for a whole model, from tokens. All rows are wanted where ``wanted`` is None."""
        for row in rows:
            if not 0 <= row.token < self.config.vocab_size:
                raise ModelError(f"token {row.token} is outside the vocabulary of {self.config.vocab_size}")
        x = self._embedding[[row.token for row in rows]]
        places = [Place(row.sequence, row.position) for row in rows]
        return self.step(x, places, range(len(rows)) if wanted is None else wanted)

    def step(
        self, x: np.ndarray, places: Sequence[Place], wanted: Sequence[int], exchange: Exchange | None = None
    ) -> np.ndarray:
        """Logits, float32 [len(wanted), this node's vocabulary], of the rows numbered in ``wanted``.

        ``x``: embeddings, float32 [rows, dim], at most MAX_ROWS rows. Each sequence's rows come in order of position
        and leave no gap to what it holds. ``exchange`` is called after each segment, but not after the output's; what
        it raises ends the step. The array is overwritten by the next call.
        """
        table = self._table(places, wanted)
        self._x[: len(places), : self.config.dim] = x
        angles = np.outer([place.position for place in places], self._frequencies)
        np.cos(angles, out=self._cos[: len(places)], casting="same_kind")
        np.sin(angles, out=self._sin[: len(places)], casting="same_kind")
        args = *self._formats, self._step, *self._layers, table
        last = 2 * self.config.n_layers
        self._step["gated"] = exchange is not None
        if exchange is None:
            self.team.run(self._run_segments, *args, 0, last + (len(wanted) > 0))
        else:
            y, stride = int(self._step["y"][0]), int(self._step["x_stride"][0])
            with self.team.led(self._run_segments, *args, 0, ALWAYS):
                for segment in range(last):
                    self._run_segments(0, *args, segment, segment + 1)
                    exchange(y, stride, len(places))
                if len(wanted):
                    self._run_segments(0, *args, last, last + 1)
        return self._logits[: len(wanted), : self.shape.vocab_size]

    def _table(self, places: Sequence[Place], wanted: Sequence[int]) -> np.ndarray:
        if not 0 < len(places) <= MAX_ROWS:
            raise ValueError(f"{len(places)} rows, and a step takes 1 to {MAX_ROWS}")
        table = np.zeros(len(places), ROW)
        for entry, (sequence, position) in zip(table, places, strict=True):
            if not 0 <= position < sequence.capacity:
                raise ModelError(f"position {position} is outside the context of {sequence.capacity} tokens")
            entry["position"], entry["keys"], entry["values"] = position, sequence.keys, sequence.values
            entry["layer_stride"], entry["head_stride"] = sequence.layer_stride, sequence.head_stride
            entry["adapter"] = sequence.adapter
        table["wanted"][: len(wanted)] = wanted
        step = self._step[0]
        step["rows"], step["logit_rows"] = len(places), len(wanted)
        step["adapted"] = (table["adapter"] != NO_ADAPTER).any()
        if self._logits is None or len(self._logits) < len(wanted):
            self._logits, step["logits"], step["logits_stride"] = self._floats(len(wanted), self.shape.vocab_size)
        return table

    def _floats(self, rows: int, columns: int) -> tuple[np.ndarray, int, int]:
        """A zeroed float32 array with padded rows, room for a whole tile of them; its address and row stride."""
        width = padded(columns)
        array = self._zeros(_tiled(rows) * width * 4).view(np.float32).reshape(-1, width)
        return array, array.ctypes.data, 4 * width

    def _zeros(self, nbytes: int) -> np.ndarray:
        memory = np.zeros(nbytes + ALIGN, np.uint8)
        start = -memory.ctypes.data % ALIGN
        return memory[start : start + nbytes]

    def _allocate(self, act: tags.Tag) -> None:
        c, n, w, step = self.config, self.shape, self.weights, self._step[0]
        q_dim, kv_dim = n.n_heads * c.head_dim, n.n_kv_heads * c.head_dim

        def buffer(name: str, columns: int, stride: str | None = None, rows: int = MAX_ROWS) -> np.ndarray:
            array, step[name], width = self._floats(rows, max(columns, 1))
            if stride:
                step[stride] = width
            self._buffers.append(array)
            return array

        def acts(name: str, columns: int, stride: str, rows: int = MAX_ROWS) -> None:
            step[stride] = acts_stride(w.tag, act, columns)
            array = self._zeros(_tiled(rows) * int(step[stride]))
            step[name] = array.ctypes.data
            self._buffers.append(array)

        def numbers(name: str, count: int) -> None:
            array = self._zeros(8 * count)
            step[name] = array.ctypes.data
            self._buffers.append(array)

        step["sync"], step["threads"] = self.team.sync, self.team.nthreads
        step["dim"], step["hidden_dim"], step["vocab"] = c.dim, n.hidden_dim, n.vocab_size
        step["heads"], step["kv_heads"], step["head_dim"] = n.n_heads, n.n_kv_heads, c.head_dim
        step["group"], step["group_start"] = c.n_heads // c.n_kv_heads, n.group_start
        step["half_split"], step["gelu"] = c.rope_type is RopeType.HALF_SPLIT, c.activation is Activation.GELU
        step["epsilon"] = c.norm_epsilon
        step["dim_bytes"], step["q_bytes"], step["hidden_bytes"] = w.dim_bytes, w.q_bytes, w.hidden_bytes
        step["final_norm"], step["output"] = w.final_norm, w.output
        step["cache_row"] = cache_row_bytes(self.cache, c.head_dim)

        self._x = buffer("x", c.dim, "x_stride")
        buffer("y", c.dim)
        buffer("norm_out", c.dim)
        buffer("qkv", padded(q_dim) + 2 * padded(kv_dim), "qkv_stride")
        buffer("queries", n.n_heads * padded(c.head_dim), "queries_stride")
        buffer("attention", q_dim, "attention_stride")
        self._cos = buffer("cos", c.head_dim // 2, "rope_stride")[:, : c.head_dim // 2]
        self._sin = buffer("sin", c.head_dim // 2)[:, : c.head_dim // 2]
        acts("dim_acts", c.dim, "dim_stride")
        acts("q_acts", q_dim, "q_stride")
        hidden_rows = MAX_ROWS
        if c.arch.has_experts:
            step["experts"], step["active"] = c.n_experts, c.n_active_experts
            hidden_rows = experts.most_places(MAX_ROWS, c.n_experts, c.n_active_experts)
            buffer("router_logits", c.n_experts, "router_stride")
            buffer("mix", c.n_active_experts, "mix_stride")
            numbers("chosen", MAX_ROWS * c.n_active_experts)
            numbers("counts", c.n_experts)
            numbers("groups", experts.GROUP * c.n_experts)
            acts("expert_acts", c.dim, "dim_stride", hidden_rows)
            buffer("expert_out", c.dim, rows=hidden_rows)
        buffer("hidden", 2 * padded(n.hidden_dim), "hidden_row_stride", hidden_rows)
        acts("hidden_acts", n.hidden_dim, "hidden_stride", hidden_rows)
        if self.adapters is not None:
            width = padded(self.adapters.max_rank)
            step["low_part"] = 4 * width
            buffer("low", MOST_TARGETS * width, "low_stride")

        head = 4 * padded(c.head_dim)
        step["heads_out"] = _aligned(head)
        step["scores"] = step["heads_out"] + _aligned(HEADS * head)
        step["scores_stride"] = _aligned(4 * (self.context + 16))
        step["scratch_stride"] = step["scores"] + HEADS * step["scores_stride"] + ALIGN
        scratch = self._zeros(self.team.nthreads * int(step["scratch_stride"]))
        step["scratch"] = scratch.ctypes.data
        self._buffers.append(scratch)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGN) * ALIGN


def _tiled(rows: int) -> int:
    """Rows rounded up to what the products work on at once."""
    return -(-rows // TILE) * TILE
