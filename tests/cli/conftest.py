"""Small files for the command line to be tried on."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dllama.embedded import model_path, tokenizer_path
from dllama.formats import Arch, FloatType, ModelConfig, ModelWriter, tensor_layout

CONFIG = ModelConfig(
    arch=Arch.LLAMA,
    dim=64,
    hidden_dim=96,
    n_layers=2,
    n_heads=4,
    n_kv_heads=2,
    head_dim=16,
    vocab_size=300,
    seq_len=128,
    weight_type=FloatType.Q40,
)


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> Path:
    """A sound model file with random weights, whose vocabulary no tokenizer of the tests has."""
    path = tmp_path_factory.mktemp("models") / "small.m"
    random = np.random.default_rng(1)
    with ModelWriter(path, CONFIG) as writer:
        for tensor in tensor_layout(CONFIG):
            writer.write(tensor.name, tensor.layer, random.standard_normal(tensor.shape).astype(np.float32))
    return path


@pytest.fixture(scope="session")
def embedded() -> SimpleNamespace:
    """Where the embedded model and its tokenizer are."""
    return SimpleNamespace(model=Path(model_path()), tokenizer=Path(tokenizer_path()))
