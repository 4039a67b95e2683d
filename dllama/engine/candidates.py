"""What the sampler needs of the logits, where each node has those of its own rows of the vocabulary.

A node reduces its logits to the tokens that it cannot rule out by itself, whatever the others have. Merged, the
candidates of all nodes hold every token that may be drawn, so that the choice is the same however the rows are split.
"""

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from dllama.engine.filters import penalise, scores, top_k, weights

# Below this temperature, logits that differ in their last float32 bit are already e^-1 apart: greedy, to rounding.
MIN_TEMPERATURE = 1e-6

MAX_RECENT = 4096
"""Recent token ids that a reduction can hold."""

MAX_ID = 2**32 - 1

PAIR = np.dtype([("id", "<u4"), ("logit", "<f4")])
MASS = struct.Struct("<d")


@dataclass(frozen=True)
class Reduction:
    """What a node does to its logits. The values that switch a step off are the defaults.

    temperature: below MIN_TEMPERATURE one token is kept, the likeliest
    top_k: keeps the k likeliest tokens
    min_p: keeps tokens at least min_p times as likely as the likeliest one; where top_k is off
    negligible: leaves out tokens of less than this share of the probability; where top_k and min_p are off
    penalty: the repetition penalty
    recent: the token ids to penalise, of the whole vocabulary; at most MAX_RECENT
    """

    temperature: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    negligible: float = 0.0
    penalty: float = 1.0
    recent: tuple[int, ...] = ()

    ALL: ClassVar["Reduction"]
    """Keeps the logits as they are."""

    @property
    def is_greedy(self) -> bool:
        return self.temperature < MIN_TEMPERATURE

    @property
    def has_mass(self) -> bool:
        """Whether candidates leave out tokens whose share of the probability counts."""
        return not self.is_greedy and self.top_k == 0 and self.min_p == 0 and self.negligible > 0

    @property
    def keeps_all(self) -> bool:
        return not (self.is_greedy or self.top_k or self.min_p or self.negligible)

    def most(self, rows: int) -> int:
        """Tokens that it may leave of so many rows, where it does not leave all."""
        fewer = (rows - 1) // 2  # than half of them
        if self.keeps_all:
            return 0
        if self.is_greedy:
            return min(1, fewer)
        return min(self.top_k or fewer, fewer)

    def to_list(self) -> list:
        """The fields in order, of types that msgpack knows."""
        return [
            float(self.temperature),
            int(self.top_k),
            float(self.min_p),
            float(self.negligible),
            float(self.penalty),
            [int(token) for token in self.recent],
        ]

    @staticmethod
    def from_list(fields: object) -> "Reduction":
        """A reduction from `to_list`, received from elsewhere. ValueError for anything else."""
        if not isinstance(fields, list | tuple) or len(fields) != 6:
            raise ValueError("a reduction has 6 fields")
        temperature, k, min_p, negligible, penalty, recent = fields
        _require(_is_real(temperature) and 0 <= temperature < math.inf, "temperature")
        _require(_is_id(k), "top_k")
        _require(_is_real(min_p) and 0 <= min_p <= 1, "min_p")
        _require(_is_real(negligible) and 0 <= negligible <= 1, "share of negligible tokens")
        _require(_is_real(penalty) and 0 < penalty < math.inf, "penalty")
        _require(isinstance(recent, list | tuple) and len(recent) <= MAX_RECENT, "list of recent tokens")
        _require(all(map(_is_id, recent)), "recent token")
        return Reduction(temperature, k, min_p, negligible, penalty, tuple(recent))


Reduction.ALL = Reduction()


def _require(holds: bool, name: str) -> None:
    if not holds:
        raise ValueError(f"the reduction's {name} is out of range or of a wrong type")


def _is_real(value: object) -> bool:
    return type(value) is float


def _is_id(value: object) -> bool:
    return type(value) is int and 0 <= value <= MAX_ID


@dataclass(frozen=True)
class Candidates:
    """Tokens that may be drawn, out of some rows of the vocabulary.

    rows: the rows that they were taken from
    ids: int64 [n], ascending
    logits: float32 [n], the repetition penalty applied; the largest of the rows is among them
    mass: where the reduction has a mass, the sum of exp((logit - largest) / temperature) over all the rows; else None
    """

    rows: range
    ids: np.ndarray
    logits: np.ndarray
    mass: float | None = None


def reduce(logits: np.ndarray, first: int, reduction: Reduction) -> Candidates:
    """The candidates among the logits of rows ``first`` and following of the vocabulary, float32 [rows].

    They are fewer than half of the rows, or all of them. The logits are left as they are; the candidates' may be a
    view of them. Logits that are no distribution make candidates that ``Sampler.choose`` refuses.
    """
    rows = range(first, first + len(logits))
    if reduction.penalty != 1:
        own = [token - first for token in reduction.recent if token in rows]
        logits = penalise(logits, own, reduction.penalty)
    kept, mass = _kept(logits, reduction) if rows else (None, None)
    if kept is None or 2 * len(kept) >= len(rows):  # with their ids they would be no fewer bytes than all the logits
        return Candidates(rows, np.arange(rows.start, rows.stop), logits, mass)
    return Candidates(rows, kept + first, logits[kept], mass)


def _kept(logits: np.ndarray, reduction: Reduction) -> tuple[np.ndarray | None, float | None]:
    """Indices of the logits to keep, ascending, None for all; and the mass."""
    if reduction.keeps_all:
        return None, None
    best = logits.argmax()  # the lowest id of equals; a NaN counts as the largest
    if not math.isfinite(logits[best]):
        return np.array([best]), 0.0 if reduction.has_mass else None
    if reduction.is_greedy:
        return np.array([best]), None
    if reduction.top_k:
        return top_k(logits, reduction.top_k) if reduction.top_k < len(logits) else None, None
    if reduction.min_p:
        # The largest logit of all is no less than the largest here, so no token passes there that does not pass here.
        return np.flatnonzero(scores(logits, reduction.temperature) >= math.log(reduction.min_p)), None
    # Top-p of V tokens: those of less than (1 - p) / V of the probability hold less than 1 - p of it together, so the
    # others reach p without them. The mass of these rows is part of the whole, so a token that is negligible here is
    # negligible there.
    likely = weights(logits, reduction.temperature)
    mass = float(likely.sum())
    return np.flatnonzero(likely >= min(mass * reduction.negligible, 1)), mass


def merge(parts: Sequence[Candidates], reduction: Reduction) -> Candidates:
    """The candidates of neighbouring rows as one, the parts in the order of the rows; at least one part has rows."""
    parts = [part for part in parts if part.rows]
    logits = np.concatenate([part.logits for part in parts])
    mass = None
    if reduction.has_mass:
        steps = [(float(part.logits.max()) - float(logits.max())) / reduction.temperature for part in parts]
        mass = math.fsum(part.mass * math.exp(step) for part, step in zip(parts, steps, strict=True))
    rows = range(parts[0].rows.start, parts[-1].rows.stop)
    return Candidates(rows, np.concatenate([part.ids for part in parts]), logits, mass)


def pack(candidates: Candidates) -> bytes:
    """Candidates as bytes, little-endian: the mass as float64 where they have one, then all the rows' logits as
    float32, or pairs of id (uint32) and logit (float32) where only some rows are left. No rows take no bytes.
    """
    mass = b"" if candidates.mass is None else MASS.pack(candidates.mass)
    if len(candidates.ids) == len(candidates.rows):
        return mass + candidates.logits.astype("<f4").tobytes()
    pairs = np.empty(len(candidates.ids), PAIR)
    pairs["id"], pairs["logit"] = candidates.ids, candidates.logits
    return mass + pairs.tobytes()


def unpack(data: bytes | memoryview, reduction: Reduction, rows: range) -> Candidates:
    """Candidates of these rows from bytes that came from elsewhere: `pack` of a `reduce` with this reduction.

    ValueError for a size that it cannot have, a mass that no rows have, and ids that are none of the rows or out of
    order; the logits may be any, also none of a distribution.
    """
    head = MASS.size if reduction.has_mass and rows else 0
    size = len(data) - head
    n, odd = divmod(size, PAIR.itemsize)
    is_whole = size == 4 * len(rows)
    if not is_whole and (odd or not 1 <= n <= reduction.most(len(rows))):
        raise ValueError(f"{len(data)} bytes are no candidates of {len(rows)} rows")
    mass = MASS.unpack_from(data)[0] if head else None
    if mass is not None and not 0 <= mass <= len(rows):
        raise ValueError(f"{len(rows)} rows have no mass of {mass}")
    if is_whole:
        logits = np.frombuffer(data, "<f4", len(rows), head).astype(np.float32)
        return Candidates(rows, np.arange(rows.start, rows.stop), logits, mass)
    pairs = np.frombuffer(data, PAIR, n, head)
    ids = pairs["id"].astype(np.int64)
    if ids[0] < rows.start or ids[-1] >= rows.stop or (np.diff(ids) <= 0).any():
        raise ValueError(f"ids of candidates are not in ascending order from {rows.start} to {rows.stop - 1}")
    return Candidates(rows, ids, pairs["logit"].astype(np.float32), mass)
