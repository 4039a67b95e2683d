"""What a pass over the layers works with: weights, threads, and the buffers of a step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dllama.engine import experts, rope
from dllama.engine.adapters import MOST_TARGETS, NO_ADAPTER
from dllama.engine.kv_cache import KVCache
from dllama.engine.shape import NodeShape
from dllama.engine.stages import ROW, STEP, TILE
from dllama.engine.weights import Source, Weights, padded
from dllama.errors import ModelError
from dllama.formats import Activation, RopeType
from dllama.kernels import tags
from dllama.kernels.attention import HEADS, cache_row_bytes
from dllama.kernels.elementwise import acts_stride
from dllama.kernels.team import Team

MAX_ROWS = 128
"""Rows of one call; longer prompts take several."""
ALIGN = 64
ALWAYS = 1 << 30
"""More parts than any model has: helpers of a led step go on until they are stopped."""


class Place(NamedTuple):
    """Where a row belongs: what a `Row` says but for the token, which nodes other than the root never see."""

    sequence: KVCache
    position: int


class Workspace:
    """Weights of a model, of a node's slice of it, or of some of its layers; threads; and the buffers of a step.

    ``act``: F32 or Q80, what the inputs of products are rounded to; ``cache``: F16, F32 or Q80, the KV caches' format;
    ``shape``: the slice's; without it the source is a whole model; ``only``, ``ends``: as in `Weights`; ``low_width``:
    the largest rank of the adapters that sequences may have, 0 where they have none.
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
        only: Sequence[int] | None = None,
        ends: bool = True,
        low_width: int = 0,
    ):
        self.source, self.config, self.team, self.cache, self.context = source, source.config, team, cache, context
        self.shape = shape or NodeShape.whole(self.config)
        self.weights = Weights(source, act, team, progress, only, ends)
        self.n_layers = len(self.weights.layers)
        self._formats = self.weights.tag, act, cache
        self._frequencies = rope.frequencies(self.config)
        self._step = np.zeros(1, STEP)
        self._buffers = []
        self._logits = None
        self._allocate(act, low_width)

    def sequence(self, adapter: int = NO_ADAPTER) -> KVCache:
        """An empty sequence. ``adapter``: the number of one of the adapters, whose values its rows add."""
        return self.sequence_of(self.context, adapter)

    def sequence_of(self, context: int, adapter: int = NO_ADAPTER) -> KVCache:
        """As ``sequence``, with room for another number of positions."""
        return KVCache(self.config, self.n_layers, self.shape.n_kv_heads, context, self.cache, adapter)

    def _table(self, places: Sequence[Place], wanted: Sequence[int]) -> np.ndarray:
        """``ROW`` records of these rows; the step's record, rotary angles and room for logits are ready for them."""
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
        angles = np.outer(table["position"], self._frequencies)
        np.cos(angles, out=self._cos[: len(places)], casting="same_kind")
        np.sin(angles, out=self._sin[: len(places)], casting="same_kind")
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

    def _allocate(self, act: tags.Tag, low_width: int) -> None:
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
        self._y = buffer("y", c.dim)
        buffer("norm_out", c.dim)
        self._qkv = buffer("qkv", padded(q_dim) + 2 * padded(kv_dim), "qkv_stride")
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
        self._hidden = buffer("hidden", 2 * padded(n.hidden_dim), "hidden_row_stride", hidden_rows)
        acts("hidden_acts", n.hidden_dim, "hidden_stride", hidden_rows)
        if low_width:
            width = padded(low_width)
            step["low_part"] = 4 * width
            self._low = buffer("low", MOST_TARGETS * width, "low_stride").reshape(-1, MOST_TARGETS, width)

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
