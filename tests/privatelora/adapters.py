"""Small adapters of random values."""

import numpy as np

from dllama.formats import ModelConfig, ModelFile
from dllama.lora import LoraAdapter
from dllama.privatelora.adapter import CloudAdapter, EdgeAdapter
from dllama.privatelora.shape import AdapterShape
from tests.engine import reference
from tests.engine.adapters import Merged


def random_halves(
    shape: AdapterShape, seed: int | None = None, dtype: type = np.float32, m_seed: int = 1
) -> tuple[CloudAdapter, EdgeAdapter]:
    """A cloud's half out of a seed, or of random A and B where it is None, and an edge's half for it."""
    rng = np.random.default_rng(m_seed)

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


def strong_halves(
    config: ModelConfig, targets=("q", "k", "v"), layers=None, ranks=(6, 9), seed: int | None = 7, m_seed: int = 1
) -> tuple[CloudAdapter, EdgeAdapter]:
    """As ``random_halves``, of an adapter that adds about as much as the model's own matrices give."""
    cloud, edge = random_halves(AdapterShape.of(config, *ranks, targets, layers), seed, m_seed=m_seed)
    if seed is None:  # about as small as those from a seed
        cloud = CloudAdapter(cloud.shape, None, {place: matrix / 50 for place, matrix in cloud.matrices.items()})
    matrices = {place: 40 * matrix for place, matrix in edge.matrices.items()}
    return cloud, EdgeAdapter(cloud.shape, matrices, cloud.fingerprint, seed)


def merged_logits(file: ModelFile, tokens, cloud: CloudAdapter, edge: EdgeAdapter, **options) -> np.ndarray:
    """float64 [tokens, vocab], of the reference with W + B·M·A for W; ``options`` as of `reference.logits`."""
    places = cloud.shape.places()
    matrices = {place: (cloud.a(*place), cloud.b(*place) @ edge.m(*place)) for place in places}
    return reference.logits(Merged(file, LoraAdapter(matrices, cloud.shape.r_c2d)), tokens, **options)
