"""Edge and cloud, real processes and real sockets: the logits are those of one node with the adapter merged."""

import numpy as np
import pytest

from dllama.lora import LoraAdapter
from dllama.privatelora.adapter import write_adapter
from dllama.privatelora.shape import AdapterShape
from dllama.targets import TARGETS
from tests.engine import reference
from tests.engine.adapters import Merged
from tests.engine.models import SHAPES, random_model
from tests.privatelora.adapters import random_halves
from tests.privatelora.nodes import CloudProcess, edge, run

N = 20
EVERY = tuple(TARGETS)
FOUR = {**SHAPES["gqa"], "n_layers": 4}


def halves(config, targets=("q", "k", "v"), layers=None, ranks=(6, 9), seed=7):
    """An adapter that adds about as much as the model's own matrices give."""
    cloud, edge_half = random_halves(AdapterShape.of(config, *ranks, targets, layers), seed)
    if seed is None:  # about as small as those from a seed
        cloud = type(cloud)(cloud.shape, None, {place: matrix / 50 for place, matrix in cloud.matrices.items()})
        edge_half = type(edge_half)(cloud.shape, edge_half.matrices, cloud.fingerprint)
    for matrix in edge_half.matrices.values():
        matrix *= 40
    return cloud, edge_half


def merged(file, cloud, edge_half):
    """The model with W + B·M·A."""
    matrices = {p: (cloud.a(*p), cloud.b(*p) @ edge_half.m(*p)) for p in cloud.shape.places()}
    return Merged(file, LoraAdapter(matrices, cloud.shape.r_c2d))


def expected(file, tokens, cloud=None, edge_half=None) -> np.ndarray:
    """Logits of one node, with W + B·M·A for W."""
    source = file if cloud is None else merged(file, cloud, edge_half)
    return reference.logits(source, tokens)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A model of four layers, its cloud, and an adapter of every target."""
    folder = tmp_path_factory.mktemp("four")
    model = random_model(folder / "model.m", FOUR)
    pair = halves(model.config, EVERY)
    write_adapter(folder, *pair)
    with CloudProcess(folder / "model.m") as cloud:
        yield model, cloud, folder, pair


@pytest.mark.parametrize("layers", [(0, 0), (1, 0), (0, 2), (1, 2)])
def test_logits_are_those_of_the_merged_model(four, layers):
    model, cloud, folder, pair = four
    tokens = np.random.default_rng(3).integers(0, model.config.vocab_size, N)
    with edge(model, cloud.address, adapter=folder, edge_layers=layers) as engine:
        sequence = engine.sequence()
        found = np.concatenate([run(engine, tokens[:13], sequence), run(engine, tokens[13:], sequence, 13)])
    want = expected(model, tokens, *pair)
    assert abs(found - want).max() < 1e-3 * abs(want).max()
