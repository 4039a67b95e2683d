"""Logits agree with Hugging Face transformers, from the checkpoint's files to the last product, in float32.

Where torch and transformers are installed they compute while the test runs; everywhere, their recorded logits are
compared (record_transformers.py).
"""

import importlib.util

import numpy as np
import pytest

from converter.convert import Settings, convert
from dllama.engine.forward import Forward
from dllama.engine.interface import Row
from dllama.formats import FloatType, ModelFile
from dllama.kernels import tags
from dllama.kernels.team import Team
from tests.converter.checkpoints import write, write_gguf, write_meta
from tests.engine.checkpoints import CONFIGS, RECORDED, TOKENS, build, logits_by_transformers, tokens, weights_of

TOLERANCE = 1e-5
"""Relative to the length of a row of logits. The project promises 1e-3; float32 gives about 1e-6."""
WAYS = {"one batch": [TOKENS], "pieces": [7, 1, 20, TOKENS - 28], "token by token": [1] * TOKENS}

FORMS = {
    "sharded safetensors": lambda *checkpoint: write(*checkpoint, shards=3),
    "bin": lambda *checkpoint: write(*checkpoint, form="bin"),
    "sharded bin": lambda *checkpoint: write(*checkpoint, shards=3, form="bin"),
    "Meta": write_meta,
    "sharded Meta": lambda *checkpoint: write_meta(*checkpoint, shards=2),
    "GGUF": write_gguf,
}

names = pytest.mark.parametrize("name", CONFIGS)
has_transformers = all(importlib.util.find_spec(module) for module in ("torch", "transformers"))


@pytest.fixture(scope="module")
def team():
    team = Team(2)
    yield team
    team.close()


def logits(team, checkpoint, pieces, ids) -> np.ndarray:
    """Logits of a checkpoint, converted, in float32 throughout."""
    converted = checkpoint.with_name("converted.m")
    convert(checkpoint, converted, Settings(FloatType.F32))
    with ModelFile(converted) as model:
        engine = Forward(model, team, tags.F32, tags.F32, model.config.seq_len)
        sequence, out, start = engine.sequence(), [], 0
        for n in pieces:
            out.append(engine.forward([Row(sequence, start + i, ids[start + i]) for i in range(n)]).copy())
            start += n
    return np.concatenate(out)


def assert_agree(found, expected):
    difference = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert difference.max() < TOLERANCE


@names
@pytest.mark.parametrize("pieces", WAYS.values(), ids=WAYS)
def test_agrees_with_the_recorded_logits(tmp_path, team, name, pieces):
    with np.load(RECORDED) as recorded:
        expected = recorded[name]
    assert_agree(logits(team, build(name, tmp_path / "checkpoint"), pieces, tokens(name)), expected)


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_a_checkpoint_agrees(tmp_path, team, form):
    with np.load(RECORDED) as recorded:
        expected = recorded["gqa"]
    checkpoint = FORMS[form](tmp_path / "checkpoint", CONFIGS["gqa"], weights_of("gqa"))
    assert_agree(logits(team, checkpoint, [TOKENS], tokens("gqa")), expected)


@pytest.mark.skipif(not has_transformers, reason="torch and transformers are not installed (extra: train)")
@names
def test_agrees_with_transformers_and_the_folder_it_saves(tmp_path, team, name):
    """The checkpoint is read and saved again by transformers, in the layout of its version, before it is converted."""
    from transformers import AutoModelForCausalLM

    written = build(name, tmp_path / "written")
    saved = tmp_path / "saved"
    AutoModelForCausalLM.from_pretrained(written).save_pretrained(saved)
    ids = np.random.default_rng(8).integers(0, CONFIGS[name]["vocab_size"], TOKENS).tolist()
    assert_agree(logits(team, saved, [TOKENS], ids), logits_by_transformers(saved, ids))
