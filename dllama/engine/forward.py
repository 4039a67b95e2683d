"""The forward pass: rows of (sequence, position, token) in, logits out.

Prefill, decoding, several sequences at once and the check of draft tokens are all the same call: rows in any number,
each seeing the positions of its own sequence up to its own, those of the same call included.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from dllama.engine.adapter_weights import AdapterWeights
from dllama.engine.interface import Row
from dllama.engine.segments import run_segments
from dllama.engine.shape import NodeShape
from dllama.engine.stages import ROW
from dllama.engine.weights import Source
from dllama.engine.workspace import ALWAYS, Place, Workspace
from dllama.errors import ModelError
from dllama.kernels import tags, trade
from dllama.kernels.jit import compiled
from dllama.kernels.team import Team


class Exchange:
    """What follows a segment: turns a node's parts of its output into the sums of all nodes' parts, in place: float32
    [rows, dim], given by address, bytes from one row to the next (which are padded to 32 values), and number of rows.
    """

    short_cut: tuple | None = None
    """The first arguments of `trade`, by which compiled code exchanges; None where it cannot."""

    def part_bytes(self, rows: int) -> int:
        """What a part takes to travel, where the exchanges that follow can take the short cut, else 0."""
        return 0

    def __call__(self, x: int, stride: int, rows: int) -> None:
        raise NotImplementedError

    def go_on(self, x: int, stride: int, rows: int) -> None:
        """The rest of an exchange that compiled code has begun, and that has stopped."""
        raise NotImplementedError


class Forward(Workspace):
    """One model, or a node's slice of it, with the compiled segments that work it; ``adapters``: those that sequences
    may have; ``exchanged``: the form of the parts that compiled code exchanges with other nodes, None where it does
    not. The rest is told in `Workspace`.
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
        only: Sequence[int] | None = None,
        exchanged: tags.Tag | None = None,
    ):
        low_width = 0 if adapters is None else adapters.max_rank
        super().__init__(source, team, act, cache, context, progress, shape, only, low_width=low_width)
        self._embedding = source.f32("embedding") if shape is None else None
        self.adapters = adapters
        records = None if adapters is None else adapters.records
        self._layers = self.weights.layers, self.weights.experts, records
        self._short_cut = None if exchanged is None else trade.example(exchanged)
        args = *self._formats, self._step, *self._layers, self._short_cut, np.zeros(1, ROW)
        self._run_segments = compiled(run_segments, 0, *args, 0, 0)

    def forward(self, rows: Sequence[Row], wanted: Sequence[int] | None = None) -> np.ndarray:
        """`step` for a whole model, from tokens. All rows are wanted where ``wanted`` is None."""
        places = [Place(row.sequence, row.position) for row in rows]
        return self.step(self.embeddings(rows), places, range(len(rows)) if wanted is None else wanted)

    def embeddings(self, rows: Sequence[Row]) -> np.ndarray:
        """float32 [rows, dim]. ModelError for a token that is none."""
        for row in rows:
            if not 0 <= row.token < self.config.vocab_size:
                raise ModelError(f"token {row.token} is outside the vocabulary of {self.config.vocab_size}")
        return self._embedding[[row.token for row in rows]]

    def step(
        self, x: np.ndarray, places: Sequence[Place], wanted: Sequence[int], exchange: Exchange | None = None
    ) -> np.ndarray:
        """Logits, float32 [len(wanted), this node's vocabulary], of the rows numbered in ``wanted``.

        ``x``: embeddings, float32 [rows, dim], at most MAX_ROWS rows. Each sequence's rows come in order of position
        and leave no gap to what it holds. An ``exchange`` follows each segment, but not the output's; what it raises
        ends the step. The array is overwritten by the next call.
        """
        last = 2 * self.n_layers
        args = self._enter(x, places, wanted)
        self._step["gated"] = exchange is not None
        if exchange is None:
            self.team.run(self._run_segments, *args, 0, last + (len(wanted) > 0))
        else:
            args = *args[:-2], exchange.short_cut, args[-1]
            y, stride = int(self._step["y"][0]), int(self._step["x_stride"][0])
            with self.team.led(self._run_segments, *args, 0, ALWAYS):
                segment = 0
                while segment < last:
                    self._step["part_bytes"] = part_bytes = exchange.part_bytes(len(places))
                    segment = self._run_segments(0, *args, segment, last if part_bytes else segment + 1)
                    if not part_bytes:
                        exchange(y, stride, len(places))
                    elif segment < last:
                        exchange.go_on(y, stride, len(places))
                        segment += 1
                if len(wanted):
                    self._run_segments(0, *args, last, last + 1)
        return self._logits[: len(wanted), : self.shape.vocab_size]

    def first_layers(self, x: np.ndarray, places: Sequence[Place], layers: int) -> np.ndarray:
        """The residual stream after the first so many of the layers, float32 [rows, dim]; ``x`` as in ``step``."""
        if layers == 0:
            return x
        args = self._enter(x, places, ())
        self._step["gated"] = False
        self.team.run(self._run_segments, *args, 0, 2 * layers)
        return (self._x[: len(places)] + self._y[: len(places)])[:, : self.config.dim]

    def last_layers(self, x: np.ndarray, places: Sequence[Place], wanted: Sequence[int], layers: int) -> np.ndarray:
        """Logits, as of ``step``, out of the residual stream that enters the layer of this number."""
        args = self._enter(x, places, wanted)
        self._step["gated"] = False
        self._y[: len(places)] = 0  # the first norm, or the output's, adds it
        self.team.run(self._run_segments, *args, 2 * layers, 2 * self.n_layers + (len(wanted) > 0))
        return self._logits[: len(wanted), : self.shape.vocab_size]

    def _enter(self, x: np.ndarray, places: Sequence[Place], wanted: Sequence[int]) -> tuple:
        """The arguments of the compiled segments for these rows."""
        table = self._table(places, wanted)
        self._x[: len(places), : self.config.dim] = x
        return *self._formats, self._step, *self._layers, self._short_cut, table
