"""Small adapters of random values."""

import numpy as np

from dllama.privatelora.adapter import CloudAdapter, EdgeAdapter
from dllama.privatelora.shape import AdapterShape


def random_halves(
    shape: AdapterShape, seed: int | None = None, dtype: type = np.float32
) -> tuple[CloudAdapter, EdgeAdapter]:
    """A cloud's half out of a seed, or of random A and B where it is None, and an edge's half for it."""
    rng = np.random.default_rng(1)

    def random(rows_columns):
        return rng.standard_normal(rows_columns, np.float32).astype(dtype)

    matrices = None
    if seed is None:
        matrices = {}
        for layer, target in shape.places():
            matrices[layer, target, "A"] = random(shape.a(target))
            matrices[layer, target, "B"] = random(shape.b(target))
    cloud = CloudAdapter(shape, seed, matrices)
    return cloud, EdgeAdapter(shape, {place: random(shape.m) for place in shape.places()}, cloud.fingerprint, seed)
