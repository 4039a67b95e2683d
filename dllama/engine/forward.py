"""The forward pass: rows of (sequence, position, token) in, logits out.

Prefill, decoding, several sequences at once and the check of draft tokens are all the same call: rows in any number,
each seeing the positions of its own sequence up to its own, those of the same call included.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dllama.engine import rope
from dllama.engine.kv_cache import KVCache
from dllama.engine.stages import ROW, STEP, run_segments
from dllama.engine.weights import Weights, padded
from dllama.errors import ModelError
from dllama.formats import Activation, ModelFile, RopeType
from dllama.kernels import dot, packed, tags
from dllama.kernels.attention import HEADS, cache_row_bytes
from dllama.kernels.elementwise import acts_stride
from dllama.kernels.team import Team

MAX_ROWS = 128
"""Rows of one call; longer prompts take several."""
ALIGN = 64


class Row(NamedTuple):
    sequence: KVCache
    position: int
    token: int


class Forward:
    """One model on one node: its weights, its threads, and the buffers of a step.

    ``act``: F32 or Q80, what the inputs of products are rounded to; ``cache``: F16, F32 or Q80, the KV caches' format.
    """

    def __init__(
        self,
        model: ModelFile,
        team: Team,
        act: tags.Tag,
        cache: tags.Tag,
        context: int,
        progress: Callable[[int, int], None] = lambda done, total: None,
    ):
        self.model, self.config, self.team, self.cache, self.context = model, model.config, team, cache, context
        self.weights = Weights(model, act, team, progress)
        self._formats = self.weights.tag, act, cache
        self._frequencies = rope.frequencies(self.config)
        self._step = np.zeros(1, STEP)
        self._buffers = []
        self._logits = None
        self._allocate(act)
        self._segments(0, 0, np.zeros(1, ROW))  # compiles, or loads what was compiled before

    def sequence(self) -> KVCache:
        """An empty sequence."""
        return KVCache(self.config, self.context, self.cache)

    def forward(self, rows: Sequence[Row], wanted: Sequence[int] | None = None) -> np.ndarray:
        """Logits, float32 [len(wanted), vocab], of the rows numbered in ``wanted`` (all rows where it is None).

        At most MAX_ROWS rows. Each sequence's rows come in order of position and leave no gap to what it holds.
        The array is overwritten by the next call.
        """
        wanted = range(len(rows)) if wanted is None else wanted
        table = self._table(rows, wanted)
        self._x[: len(rows), : self.config.dim] = self.weights.embedding[[row.token for row in rows]]
        angles = np.outer([row.position for row in rows], self._frequencies)
        np.cos(angles, out=self._cos[: len(rows)], casting="same_kind")
        np.sin(angles, out=self._sin[: len(rows)], casting="same_kind")
        last = 2 * self.config.n_layers
        self._segments(0, last + (len(wanted) > 0), table)
        return self._logits[: len(wanted), : self.config.vocab_size]

    def _table(self, rows: Sequence[Row], wanted: Sequence[int]) -> np.ndarray:
        if not 0 < len(rows) <= MAX_ROWS:
            raise ValueError(f"{len(rows)} rows, and a step takes 1 to {MAX_ROWS}")
        table = np.zeros(len(rows), ROW)
        for entry, (sequence, position, token) in zip(table, rows, strict=True):
            if not 0 <= position < sequence.capacity:
                raise ModelError(f"position {position} is outside the context of {sequence.capacity} tokens")
            if not 0 <= token < self.config.vocab_size:
                raise ModelError(f"token {token} is outside the vocabulary of {self.config.vocab_size}")
            entry["position"], entry["keys"], entry["values"] = position, sequence.keys, sequence.values
            entry["layer_stride"], entry["head_stride"] = sequence.layer_stride, sequence.head_stride
        table["wanted"][: len(wanted)] = wanted
        step = self._step[0]
        step["rows"], step["logit_rows"] = len(rows), len(wanted)
        if self._logits is None or len(self._logits) < len(wanted):
            self._logits, step["logits"], step["logits_stride"] = self._floats(len(wanted), self.config.vocab_size)
        return table

    def _segments(self, first: int, last: int, rows: np.ndarray) -> None:
        self.team.run(run_segments, *self._formats, self._step, self.weights.layers, rows, first, last)

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
        c, w, step = self.config, self.weights, self._step[0]

        def buffer(name: str, columns: int, stride: str | None = None) -> np.ndarray:
            array, step[name], width = self._floats(MAX_ROWS, columns)
            if stride:
                step[stride] = width
            self._buffers.append(array)
            return array

        def acts(name: str, columns: int) -> None:
            stride = acts_stride(w.tag, act, columns)
            array = self._zeros(_tiled(MAX_ROWS) * stride)
            step[f"{name}_acts"], step[f"{name}_stride"] = array.ctypes.data, stride
            self._buffers.append(array)

        step["sync"], step["threads"] = self.team.sync, self.team.nthreads
        step["dim"], step["hidden_dim"], step["vocab"] = c.dim, c.hidden_dim, c.vocab_size
        step["heads"], step["kv_heads"], step["head_dim"] = c.n_heads, c.n_kv_heads, c.head_dim
        step["half_split"], step["gelu"] = c.rope_type is RopeType.HALF_SPLIT, c.activation is Activation.GELU
        step["epsilon"] = c.norm_epsilon
        step["dim_bytes"], step["q_bytes"], step["hidden_bytes"] = w.dim_bytes, w.q_bytes, w.hidden_bytes
        step["final_norm"], step["output"] = w.final_norm, w.output
        step["cache_row"] = cache_row_bytes(self.cache, c.head_dim)

        self._x = buffer("x", c.dim, "x_stride")
        buffer("y", c.dim)
        buffer("norm_out", c.dim)
        buffer("qkv", padded(c.q_dim) + 2 * padded(c.kv_dim), "qkv_stride")
        buffer("queries", c.n_heads * padded(c.head_dim), "queries_stride")
        buffer("attention", c.q_dim, "attention_stride")
        buffer("hidden", 2 * padded(c.hidden_dim), "hidden_row_stride")
        self._cos = buffer("cos", c.head_dim // 2, "rope_stride")[:, : c.head_dim // 2]
        self._sin = buffer("sin", c.head_dim // 2)[:, : c.head_dim // 2]
        acts("dim", c.dim)
        acts("q", c.q_dim)
        acts("hidden", c.hidden_dim)

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
    tile = math.lcm(dot.TOKENS, packed.TOKENS)
    return -(-rows // tile) * tile
