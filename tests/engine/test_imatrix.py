"""What enters the products, as the engine records it, against the float64 reference."""

from collections import defaultdict

import numpy as np
import pytest

from dllama.engine.imatrix import Recorder
from dllama.engine.workspace import MAX_ROWS
from dllama.errors import ModelError
from dllama.formats import FloatType
from dllama.kernels import tags
from dllama.kernels.team import Team
from tests.engine import reference
from tests.engine.models import BLOCKED, MHA, SHAPES, random_model


@pytest.fixture(scope="module", params=[1, 2])
def team(request):
    team = Team(request.param)
    yield team
    team.close()


def windows_for(model, lengths, seed=1) -> list[list[int]]:
    random = np.random.default_rng(seed)
    return [random.integers(0, model.config.vocab_size, n).tolist() for n in lengths]


def expected_means(model, windows) -> dict:
    """The mean square of each column of what the reference multiplies, float64."""
    inputs = defaultdict(list)
    for window in windows:
        reference.logits(model, window, see=lambda name, layer, x: inputs[name, layer].append(np.atleast_2d(x)))
    return {key: np.square(np.concatenate(rows)).mean(axis=0) for key, rows in inputs.items()}


def check(recorder, model, windows, tolerance) -> None:
    for window in windows:
        recorder.record(window)
    found, expected = recorder.means(), expected_means(model, windows)
    assert recorder.tokens == sum(map(len, windows))
    assert set(found) == set(expected)
    for key, means in expected.items():
        assert found[key].dtype == np.float32
        np.testing.assert_allclose(found[key], means, rtol=tolerance, atol=tolerance * means.mean(), err_msg=str(key))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_means_are_those_of_the_reference(tmp_path, team, shape):
    model = random_model(tmp_path / "model.m", shape)
    recorder = Recorder(model, team, tags.F32, tags.F32, shape["seq_len"])
    check(recorder, model, windows_for(model, [MAX_ROWS + 21, 1, 40]), 1e-4)


@pytest.mark.parametrize("weight_type", FloatType)
def test_means_of_every_weight_type(tmp_path, team, weight_type):
    model = random_model(tmp_path / "model.m", BLOCKED, weight_type)
    recorder = Recorder(model, team, tags.Q80, tags.F16, 64)
    check(recorder, model, windows_for(model, [64, 30]), 0.1)


def test_an_expert_that_nobody_chose(tmp_path, team):
    """One token has three of the seven."""
    model = random_model(tmp_path / "model.m", SHAPES["qwen3-moe"])
    recorder = Recorder(model, team, tags.F32, tags.F32, 16)
    recorder.record([1])
    means = recorder.means()
    for layer in range(2):
        idle = [expert for expert in range(7) if (means[f"w1.{expert}", layer] == 1).all()]
        assert len(idle) == 4
        assert all((means[f"{name}.{expert}", layer] == 1).all() for name in ("w2", "w3") for expert in idle)
    assert {(info.name, info.layer) for info in model.tensors() if not info.is_whole} == {*means, ("embedding", None)}


def test_weights_that_are_not_finite(tmp_path, team):
    model = random_model(tmp_path / "model.m", MHA)
    with open(model.path, "r+b") as file:
        file.seek(model.info("w3", 1).offset)
        file.write(np.array(np.nan, "<f4").tobytes())
    recorder = Recorder(model, team, tags.F32, tags.F32, 16)
    recorder.record([1, 2, 3])
    with pytest.raises(ModelError, match="what enters w2 of layer 1 is not finite"):
        recorder.means()
