"""Which columns of a model's matrices matter: the mean square of what they are multiplied with, over a text.

A forward pass that stops between segments leaves the inputs of their products in its buffers, as floats: after an
attention segment those of q, k, v and of o, after an FFN segment those of w1, w3 and of w2, after the output rows
those of the output matrix.
"""

import ctypes
from collections.abc import Callable, Sequence

import numpy as np

from dllama.engine.forward import MAX_ROWS, Forward, Place
from dllama.errors import ModelError
from dllama.formats import ModelFile
from dllama.formats.imatrix import Key
from dllama.kernels import tags
from dllama.kernels.team import Team

ATTENTION = {"norm_out": ("q", "k", "v"), "attention": ("o",)}
FEED_FORWARD = {"norm_out": ("w1", "w3"), "hidden": ("w2",)}
OUTPUT = {"norm_out": ("output",)}
"""For each kind of segment, the buffers that hold inputs of products, and the matrices that these meet."""

STRIDES = {"norm_out": "x_stride", "attention": "attention_stride", "hidden": "hidden_row_stride"}


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
            if not info.is_vector and info.name != "embedding" and info.name not in known:
                raise ModelError(f"{model.path}: the importance of {info.name}'s columns cannot be measured")
        super().__init__(model, team, act, cache, context, progress)
        self.tokens = 0
        self._squares: dict[Key, np.ndarray] = {}

    def record(self, tokens: Sequence[int]) -> None:
        """Runs tokens that follow one another, from position 0 on; at most as many as the context holds."""
        sequence = self.sequence()
        for first in range(0, len(tokens), MAX_ROWS):
            batch = tokens[first : first + MAX_ROWS]
            places = [Place(sequence, first + i) for i in range(len(batch))]
            segments = iter(range(2 * self.config.n_layers))
            self.step(
                self._embedding[batch], places, range(len(batch)),
                lambda y, stride, rows, segments=segments: self._add_segment(next(segments), rows),
            )  # fmt: skip
            self._add(OUTPUT, None, len(batch))
            self.tokens += len(batch)

    def means(self) -> dict[Key, np.ndarray]:
        """The mean square of each input column over all tokens: float32 [columns] for each matrix."""
        means = {key: (squares / self.tokens).astype(np.float32) for key, squares in self._squares.items()}
        for (name, layer), values in means.items():
            if not np.isfinite(values).all():
                where = name if layer is None else f"{name} of layer {layer}"
                raise ModelError(f"{self.source.path}: what enters {where} is not finite: its weights are damaged")
        return means

    def _add_segment(self, segment: int, rows: int) -> None:
        self._add(FEED_FORWARD if segment % 2 else ATTENTION, segment // 2, rows)

    def _add(self, inputs: dict[str, tuple[str, ...]], layer: int | None, rows: int) -> None:
        """Adds what the buffers hold for the matrices of a segment."""
        for buffer, names in inputs.items():
            columns = self.source.info(names[0], layer).columns
            squares = np.square(self._rows(buffer, rows)[:, :columns], dtype=np.float64).sum(axis=0)
            for name in names:
                key = name, layer
                self._squares[key] = self._squares.get(key, 0) + squares

    def _rows(self, buffer: str, rows: int) -> np.ndarray:
        """The first rows of a buffer of the step: float32 [rows, padded columns]."""
        step = self._step[0]
        width = int(step[STRIDES[buffer]]) // 4
        memory = (ctypes.c_float * (rows * width)).from_address(int(step[buffer]))
        return np.frombuffer(memory, np.float32).reshape(rows, width)
