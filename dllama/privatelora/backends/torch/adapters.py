"""A and B of the edges' adapters on the device."""

from __future__ import annotations

import threading
from typing import NamedTuple

import torch

from dllama.formats import ModelConfig
from dllama.privatelora.adapter import CloudAdapter
from dllama.privatelora.backends.torch.plan import Plan
from dllama.privatelora.frozen_weights import MOST_ADAPTERS
from dllama.privatelora.passage import PRODUCTS, Stop, stops, targets_of
from dllama.privatelora.shape import AdapterShape
from dllama.targets import TARGETS


class _Pair(NamedTuple):
    """A and B of a product's targets.

    a: [targets·r_c2d, inputs];  places: of the targets that have them among the product's;  b: for each of these its
    place, the columns of the product's output that it adds to, and B transposed, [r_d2c, columns]
    """

    a: torch.Tensor
    places: slice
    b: list[tuple[int, slice, torch.Tensor]]


class Adapters:
    """Room for MOST_ADAPTERS adapters, which come and go, in the products' dtype."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device, lock: threading.RLock):
        self._config, self._dtype, self._device, self._lock = config, dtype, device, lock
        self._shapes: list[AdapterShape | None] = [None] * MOST_ADAPTERS
        self._pairs: list[dict[Stop, _Pair]] = [{} for _ in range(MOST_ADAPTERS)]

    def add(self, adapter: CloudAdapter, layers: range) -> int:
        """As of `Backend`, and LookupError where there is no room for another. The device is used under the lock."""
        pairs = {stop: self._pair(adapter, stop) for stop in stops(adapter.shape, layers)}
        with self._lock:
            number = next((i for i, shape in enumerate(self._shapes) if shape is None), None)
            if number is None:
                raise LookupError(f"the cloud has {MOST_ADAPTERS} adapters already, and room for no more")
            self._shapes[number], self._pairs[number] = adapter.shape, pairs
        return number

    def remove(self, number: int) -> None:
        self._shapes[number], self._pairs[number] = None, {}

    def ranks(self, plan: Plan) -> tuple[int, int]:
        """The largest r_c2d and r_d2c of a batch's rows, 0 where none has an adapter."""
        shapes = [self._shapes[number] for number, _ in plan.adapters if number >= 0]
        return max((s.r_c2d for s in shapes), default=0), max((s.r_d2c for s in shapes), default=0)

    def shrink(self, plan: Plan, stop: Stop, x: torch.Tensor, low: torch.Tensor) -> None:
        """low = A·x;  x: [rows, inputs];  low: float32 [rows, targets of the product, ranks], 0 where there is no A"""
        low.zero_()
        for number, rows in plan.adapters:
            pair = self._pairs[number].get(stop) if number >= 0 else None
            if pair is not None:
                rank = self._shapes[number].r_c2d
                low[rows, pair.places, :rank] = torch.mm(x[rows], pair.a.t()).unflatten(1, (-1, rank))

    def expand(self, plan: Plan, stop: Stop, low: torch.Tensor, out: torch.Tensor) -> None:
        """out += B·low;  low: as of ``shrink``, values of r_d2c;  out: [rows, outputs of the product side by side]"""
        low = low.to(self._dtype)
        for number, rows in plan.adapters:
            pair = self._pairs[number].get(stop) if number >= 0 else None
            for place, columns, b in pair.b if pair is not None else ():
                out[rows, columns].addmm_(low[rows, place, : len(b)], b)

    def _pair(self, adapter: CloudAdapter, stop: Stop) -> _Pair:
        a, b, places, start = [], [], [], 0
        present = targets_of(adapter.shape, stop.product)
        for place, target in enumerate(PRODUCTS[stop.product]):
            width = getattr(self._config, TARGETS[target].outputs)
            if target in present:
                places.append(place)
                a.append(torch.from_numpy(adapter.a(stop.layer, target)))
                of_target = torch.from_numpy(adapter.b(stop.layer, target)).t()
                b.append((place, slice(start, start + width), of_target.contiguous()))
            start += width
        step = 1 if len(places) == 1 else places[1] - places[0]  # of three places at most
        with self._lock:
            return _Pair(
                torch.cat(a).to(self._device, self._dtype),
                slice(places[0], places[-1] + 1, step),
                [(place, columns, matrix.to(self._device, self._dtype)) for place, columns, matrix in b],
            )
