"""A pass of some rows through the cloud's layers, and the places where it meets the edge."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from dllama.cluster.links import MAX_MESSAGE_BYTES
from dllama.engine.workspace import MAX_ROWS, Place
from dllama.privatelora.shape import AdapterShape
from dllama.targets import TARGETS

PRODUCTS = (("q", "k", "v"), ("o",), ("gate", "up"), ("down",))
"""Targets whose products have one input, A·x of which travels in one message."""


MOST_ROWS = 1024
"""Of a step: a prompt of so many tokens meets the edge once at each stop."""


def most_rows(shape: AdapterShape | None, dim: int) -> int:
    """The rows that a step may have, so that none of its messages is too large, whatever the form of its values."""
    ranks = (0, 0) if shape is None else (shape.r_c2d, shape.r_d2c)
    widest = max(dim, *(max(map(len, PRODUCTS)) * rank for rank in ranks))
    return min(MOST_ROWS, MAX_MESSAGE_BYTES // (4 * widest))


def spans(rows: int) -> list[slice]:
    """So many rows, MAX_ROWS at a time."""
    return [slice(first, min(first + MAX_ROWS, rows)) for first in range(0, rows, MAX_ROWS)]


class Stop(NamedTuple):
    """A product whose adapter the edge completes: ``layer``, and ``product`` as a number in PRODUCTS."""

    layer: int
    product: int

    @property
    def half(self) -> int:
        """Its number among the halves of the stack's products (see `dllama.engine.halves`): what makes its A·x."""
        return 8 * self.layer + 2 * self.product


def stops(shape: AdapterShape | None, layers: range) -> Iterator[Stop]:
    """Where a pass through these layers meets the edge, in order; nowhere without an adapter."""
    for layer in layers if shape is not None else ():
        if layer in shape.layers:
            for number, targets in enumerate(PRODUCTS):
                if set(targets).intersection(shape.targets):
                    yield Stop(layer, number)


def targets_of(shape: AdapterShape, product: int) -> list[str]:
    """The targets of a product that have an adapter, in the order in which their values travel."""
    return [name for name in TARGETS if name in PRODUCTS[product] and name in shape.targets]


@dataclass(eq=False)
class Passage:
    """Rows of one edge's step on their way, at most MAX_ROWS.

    places: of each row;  adapter: the backend's number, -1 for none;  state: the backend's own
    x: the residual stream that enters, float32 [rows, dim], until the backend has taken it
    answer: M·A·x of the stop before, float32 [rows, targets of the product, r_d2c], until the backend has taken it
    """

    places: Sequence[Place]
    adapter: int
    x: np.ndarray | None
    answer: np.ndarray | None = None
    state: Any = field(default=None, repr=False)
