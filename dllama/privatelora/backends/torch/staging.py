"""Values on the device that also have a place in pinned memory here, through which they go there and come back."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch

MOST_SHAPES = 256
"""Whose views are kept: to make one costs Python as much as a copy."""


class Views(NamedTuple):
    """The same values of one shape: on the device, here, and these as an array."""

    device: torch.Tensor
    here: torch.Tensor
    array: np.ndarray

    def upload(self) -> None:
        """What is here to the device, in the order of its work."""
        self.device.copy_(self.here, non_blocking=True)

    def download(self) -> None:
        """What is on the device to here; on CUDA it is here when the device has come so far."""
        self.here.copy_(self.device, non_blocking=True)


class Staging:
    """Room for so many float32."""

    def __init__(self, count: int, device: torch.device):
        self._device = torch.zeros(count, device=device)
        self._here = torch.zeros(count, pin_memory=device.type == "cuda")
        self._views: dict[tuple[int, ...], Views] = {}

    def __getitem__(self, shape: tuple[int, ...]) -> Views:
        """The first values, in a shape."""
        views = self._views.get(shape)
        if views is None:
            if len(self._views) >= MOST_SHAPES:
                self._views.clear()
            device, here = (room[: math.prod(shape)].view(shape) for room in (self._device, self._here))
            views = self._views[shape] = Views(device, here, here.numpy())
        return views
