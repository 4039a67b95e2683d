"""Which columns of a model's matrices matter: the mean square of what they are multiplied with, over a text.

A forward pass that stops between segments leaves the inputs of their products in its buffers, as floats: after an
attention segment those of q, k, v and of o, after an FFN segment those of w1, w3 and of w2, after the output rows
those of the output matrix. An expert's matrices are measured over the tokens that chose it.
"""

import ctypes
import itertools
from collections import Counter
from collections.abc import Callable, Sequence

import numpy as np

from dllama.engine.experts import GROUP
from dllama.engine.forward import Exchange, Forward
from dllama.engine.workspace import MAX_ROWS, Place
from dllama.errors import ModelError
from dllama.formats import ModelFile, expert_name
from dllama.formats.imatrix import Key
from dllama.kernels import tags
from dllama.kernels.team import Team

ATTENTION = {"norm_out": ("q", "k", "v"), "attention": ("o",)}
FEED_FORWARD = {"norm_out": ("w1", "w3"), "hidden": ("w2",)}
OUTPUT = {"norm_out": ("output",)}
"""For each kind of segment, the buffers that hold inputs of products, and the matrices that these meet."""

STRIDES = {"norm_out": "x_stride", "attention": "attention_stride", "hidden": "hidden_row_stride"}


class _AfterEach(Exchange):
    """Nothing is exchanged: a function is called with the segment's number and the rows."""

    def __init__(self, function: Callable[[int, int], None]):
        self._function, self._segments = function, itertools.count()

    def __call__(self, x: int, stride: int, rows: int) -> None:
        self._function(next(self._segments), rows)


class Recorder(Forward):
    """A forward pass over a whole model that adds up the squares of what enters each product.

    tokens: how many were run so far.  Raises ModelError for a model with matrices that it does not know.
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
        known = {name for segment in (ATTENTION, FEED_FORWARD, OUTPUT) for names in segment.values() for name in names}
        for info in model.tensors():
            if not info.is_whole and info.name != "embedding" and info.kind not in known:
                raise ModelError(f"{model.path}: the importance of {info.name}'s columns cannot be measured")
        super().__init__(model, team, act, cache, context, progress)
        self.tokens = 0
        self._squares: dict[Key, np.ndarray] = {}
        self._counts: Counter[Key] = Counter()

    def record(self, tokens: Sequence[int]) -> None:
        """Runs tokens that follow one another, from position 0 on; at most as many as the context holds."""
        sequence = self.sequence()
        for first in range(0, len(tokens), MAX_ROWS):
            batch = tokens[first : first + MAX_ROWS]
            places = [Place(sequence, first + i) for i in range(len(batch))]
            self.step(self._embedding[batch], places, range(len(batch)), _AfterEach(self._add_segment))
            self._add(OUTPUT, None, len(batch))
            self.tokens += len(batch)

    def means(self) -> dict[Key, np.ndarray]:
        """The mean square of each input column over all tokens: float32 [columns] for each matrix.

        Of an expert that no token chose nothing is known: all columns count alike, as 1.
        """
        means = {key: (squares / self._counts[key]).astype(np.float32) for key, squares in self._squares.items()}
        for info in self.source.tensors():
            if info.expert is not None and (info.name, info.layer) not in means:
                means[info.name, info.layer] = np.ones(info.columns, np.float32)
        for (name, layer), values in means.items():
            if not np.isfinite(values).all():
                where = name if layer is None else f"{name} of layer {layer}"
                raise ModelError(f"{self.source.path}: what enters {where} is not finite: its weights are damaged")
        return means

    def _add_segment(self, segment: int, rows: int) -> None:
        if segment % 2 and self.config.arch.has_experts:
            self._add_experts(segment // 2, rows)
        else:
            self._add(FEED_FORWARD if segment % 2 else ATTENTION, segment // 2, rows)

    def _add_experts(self, layer: int, rows: int) -> None:
        """Adds what met each expert: the rows that chose it, and the hidden values at its places."""
        step = self._step[0]
        chosen = self._integers("chosen", rows, self.config.n_active_experts)
        inputs, hidden = self._rows("norm_out", rows), self._rows("hidden", int(step["places"]))
        for expert, first, count in self._integers("groups", int(step["n_groups"]), GROUP):
            chose = ((chosen >= first) & (chosen < first + count)).any(axis=1)
            for buffer, values in (("norm_out", inputs[chose]), ("hidden", hidden[first : first + count])):
                self._add_squares([(expert_name(name, expert), layer) for name in FEED_FORWARD[buffer]], values)

    def _add(self, inputs: dict[str, tuple[str, ...]], layer: int | None, rows: int) -> None:
        """Adds what the buffers hold for the matrices of a segment."""
        for buffer, names in inputs.items():
            self._add_squares([(name, layer) for name in names], self._rows(buffer, rows))

    def _add_squares(self, keys: Sequence[Key], values: np.ndarray) -> None:
        """Adds inputs, float32 [rows, padded columns], that matrices of one width have in common."""
        columns = self.source.info(*keys[0]).columns
        squares = np.square(values[:, :columns], dtype=np.float64).sum(axis=0)
        for key in keys:
            self._squares[key] = self._squares.get(key, 0) + squares
            self._counts[key] += len(values)

    def _rows(self, buffer: str, rows: int) -> np.ndarray:
        """The first rows of a buffer of the step: float32 [rows, padded columns]."""
        step = self._step[0]
        width = int(step[STRIDES[buffer]]) // 4
        memory = (ctypes.c_float * (rows * width)).from_address(int(step[buffer]))
        return np.frombuffer(memory, np.float32).reshape(rows, width)

    def _integers(self, buffer: str, rows: int, columns: int) -> np.ndarray:
        """The first numbers of a buffer of the step: int64 [rows, columns]."""
        memory = (ctypes.c_int64 * (rows * columns)).from_address(int(self._step[0][buffer]))
        return np.frombuffer(memory, np.int64).reshape(rows, columns)
