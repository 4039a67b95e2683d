"""Recorded importance at work: Q40 weights that are closer where the activations are large."""

import dataclasses

import numpy as np
import pytest

from converter.quantise import quantise
from dllama.engine.imatrix import Recorder
from dllama.formats import FloatType, ModelConfig, ModelFile, ModelWriter, tensor_layout
from dllama.kernels import tags
from dllama.kernels.team import Team
from tests.engine import reference
from tests.engine.models import BLOCKED

CONFIG = ModelConfig(**{**BLOCKED, "weight_type": FloatType.F32})


def uneven_model(path, seed: int) -> ModelFile:
    """Random weights whose norms let some columns through much louder than others, as trained ones do."""
    random = np.random.default_rng(seed)
    with ModelWriter(path, CONFIG) as writer:
        for info in tensor_layout(CONFIG):
            values = random.standard_normal((info.rows, info.columns)) / np.sqrt(info.columns)
            if info.is_vector:
                values = random.lognormal(0, 1, values.shape)
            writer.write(info.name, info.layer, values.astype(np.float32))
    return ModelFile(path)


def in_q40(path, model: ModelFile, means: dict) -> ModelFile:
    """The model with its matrices in Q40; means: what importance they have, none for those that are not in it."""
    config = dataclasses.replace(CONFIG, weight_type=FloatType.Q40)
    with ModelWriter(path, config) as writer:
        for info in tensor_layout(config):
            values = np.atleast_2d(model.f32(info.name, info.layer))
            raw = quantise(values, info.float_type, importance=means.get((info.name, info.layer)))
            writer.write(info.name, info.layer, raw)
    return ModelFile(path)


@pytest.mark.parametrize("seed", range(3))
def test_logits_of_another_text_are_closer(tmp_path, seed):
    model = uneven_model(tmp_path / "f32.m", seed)
    random = np.random.default_rng(seed)
    recorded, other = (random.integers(0, CONFIG.vocab_size, 120).tolist() for _ in range(2))
    team = Team(1)
    recorder = Recorder(model, team, tags.F32, tags.F32, len(recorded))
    recorder.record(recorded)
    team.close()

    exact = reference.logits(model, other)
    plain, weighted = (
        np.linalg.norm(reference.logits(in_q40(tmp_path / f"{len(means)}.m", model, means), other) - exact)
        for means in ({}, recorder.means())
    )
    assert weighted < 0.92 * plain
