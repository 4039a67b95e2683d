"""What the stack must know of a batch: where its rows belong, what they attend to, which adapters they have."""

from __future__ import annotations

from collections.abc import Sequence as Rows
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch

from dllama.engine import rope
from dllama.engine.workspace import MAX_ROWS, Place
from dllama.formats import ModelConfig
from dllama.privatelora.backends.torch.pages import PAGE, Sequence

FEW_ROWS = 32
"""Up to so many rows, each of another sequence, are a batch of a fixed shape."""
MOST_MIXTURES = 8
"""Of adapters in a batch, with the rows of each, that are fixed shapes too: each takes as many graphs as a model has
stops. Rarer ones run as they come."""


class Attention(NamedTuple):
    """Rows that attend together: as many of each of some sequences.

    rows: of the batch, sequence by sequence;  n_sequences;  past: int64 [sequences·positions], slots of the pool;
    mask: [sequences, 1, rows of a kv head and a sequence, positions], 0 for what is attended to, else -infinity
    """

    rows: slice | torch.Tensor
    n_sequences: int
    past: torch.Tensor
    mask: torch.Tensor


@dataclass(frozen=True)
class Plan:
    """A batch of rows.

    n_rows: with those that fill it up, whose values are 0;  adapters: their numbers, and the rows of each
    key: of a batch of a fixed shape, whose tensors all lie where those of the last batch with this key lay; else None
    """

    n_rows: int
    adapters: tuple[tuple[int, slice], ...]
    attention: tuple[Attention, ...]
    key: tuple | None


class Planner:
    """Makes plans. What is known of each row lies in its tensors, for the batch planned last:

    cos, sin: float32 [MAX_ROWS, 1, head_dim], what a head is multiplied with, and what the head turned by half;
    slots: int64 [MAX_ROWS], where in the pool the keys and values go
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        self._config, self._dtype, self._device = config, dtype, device
        self._frequencies = rope.frequencies(config)
        self.cos = torch.zeros(MAX_ROWS, 1, config.head_dim, device=device)
        self.sin = torch.zeros_like(self.cos)
        self.slots = torch.zeros(MAX_ROWS, dtype=torch.int64, device=device)
        self._fixed: dict[tuple[int, int], Attention] = {}
        self._mixtures: set[tuple] = set()

    def plan(self, places: Rows[Place], adapters: Rows[int]) -> Plan:
        """``adapters``: the number of each row. The sequences have their pages."""
        of_sequence: dict[Sequence, list[int]] = {}
        for row, place in enumerate(places):
            of_sequence.setdefault(place.sequence, []).append(row)
        spans = _spans(adapters)
        few = len(of_sequence) == len(places) <= FEW_ROWS
        # A mixture of experts looks which of them were chosen: its shapes are never fixed.
        fixed = few and not self._config.arch.has_experts and self._is_common(spans)
        n_rows = _power_of_two(len(places)) if fixed else len(places)
        positions = np.zeros(n_rows, np.int64)
        positions[: len(places)] = [place.position for place in places]
        self._place(places, positions)
        if fixed:
            pages = _power_of_two(int(positions.max()) // PAGE + 1)
            attention = self._attention(list(of_sequence), positions[:, None], pages, slice(0, n_rows))
            key = n_rows, pages
            if key in self._fixed:
                self._fixed[key].past.copy_(attention.past)
                self._fixed[key].mask.copy_(attention.mask)
            attention = self._fixed.setdefault(key, attention)
            number, last = spans[-1]
            spans = (*spans[:-1], (number, slice(last.start, n_rows)))  # with the rows that fill the batch up
            return Plan(n_rows, spans, (attention,), (*key, *_numbers(spans)))
        return Plan(n_rows, spans, self._parts(of_sequence, positions), None)

    def forget(self) -> None:
        """An adapter goes: its number may be another's next."""
        self._mixtures.clear()

    def _is_common(self, spans: tuple[tuple[int, slice], ...]) -> bool:
        """Whether a batch with these adapters is worth keeping: of several they are among the first MOST_MIXTURES."""
        mixture = _numbers(spans)
        if len(spans) > 1 and len(self._mixtures) < MOST_MIXTURES:
            self._mixtures.add(mixture)
        return len(spans) == 1 or mixture in self._mixtures

    def _place(self, places: Rows[Place], positions: np.ndarray) -> None:
        """Angles and slots of the rows; those that fill the batch up write to page 0."""
        angles = np.outer(positions, self._frequencies)
        cos, sin = np.cos(angles), np.sin(angles)
        cos, sin = np.concatenate((cos, cos), 1), np.concatenate((-sin, sin), 1)
        slots = np.zeros(len(positions), np.int64)
        slots[: len(places)] = [
            place.sequence.pages[place.position // PAGE] * PAGE + place.position % PAGE for place in places
        ]
        for tensor, values in ((self.cos, cos[:, None]), (self.sin, sin[:, None]), (self.slots, slots)):
            tensor[: len(positions)].copy_(torch.from_numpy(values))

    def _parts(self, of_sequence: dict[Sequence, list[int]], positions: np.ndarray) -> tuple[Attention, ...]:
        """Sequences with one row attend together, others on their own."""
        single = [(sequence, rows[0]) for sequence, rows in of_sequence.items() if len(rows) == 1]
        several = [([sequence], rows) for sequence, rows in of_sequence.items() if len(rows) > 1]
        parts = [([sequence for sequence, _ in single], [row for _, row in single])] if single else []
        attention = []
        for sequences, rows in parts + several:
            at = positions[rows].reshape(len(sequences), -1)
            where = torch.tensor(rows, device=self._device)
            attention.append(self._attention(sequences, at, int(at.max()) // PAGE + 1, where))
        return tuple(attention)

    def _attention(
        self, sequences: Rows[Sequence], positions: np.ndarray, n_pages: int, rows: slice | torch.Tensor
    ) -> Attention:
        """positions: [sequences, rows of each]; there may be more of them than sequences, to fill the batch up"""
        tables = np.zeros((len(positions), n_pages, 1), np.int64)
        for table, sequence in zip(tables, sequences, strict=False):
            pages = sequence.pages[:n_pages]
            table[: len(pages), 0] = pages
        past = torch.from_numpy(tables).to(self._device) * PAGE + torch.arange(PAGE, device=self._device)
        seen = torch.arange(n_pages * PAGE, device=self._device) <= torch.from_numpy(positions)[..., None].to(
            self._device
        )
        group = self._config.n_heads // self._config.n_kv_heads
        mask = torch.zeros(seen.shape, dtype=self._dtype, device=self._device).masked_fill_(~seen, -torch.inf)
        return Attention(rows, len(positions), past.flatten(), mask.repeat(1, group, 1)[:, None])


def _spans(adapters: Rows[int]) -> tuple[tuple[int, slice], ...]:
    """Neighbouring rows with the same adapter."""
    starts = [row for row, number in enumerate(adapters) if row == 0 or number != adapters[row - 1]]
    ends = [*starts[1:], len(adapters)]
    return tuple((adapters[start], slice(start, end)) for start, end in zip(starts, ends, strict=True))


def _numbers(spans: tuple[tuple[int, slice], ...]) -> tuple[tuple[int, int, int], ...]:
    """Spans as what may be a key."""
    return tuple((number, rows.start, rows.stop) for number, rows in spans)


def _power_of_two(n: int) -> int:
    """n or, where it is none, the next."""
    return 1 << (n - 1).bit_length()
