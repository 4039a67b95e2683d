"""Which backend a device's name gives."""

import pytest

from dllama.errors import KernelError
from dllama.formats import FloatType
from dllama.privatelora.backends import torch
from dllama.privatelora.backends.cpu import CpuBackend
from dllama.privatelora.backends.open import open_backend
from tests.engine.models import SHAPES, random_model


@pytest.mark.parametrize("weights, words", [("f16", "--unpack has no effect: "), (None, None)])
def test_auto_without_a_gpu_is_the_cpu(tmp_path, monkeypatch, weights, words):
    def missing(*args, **options):
        raise KernelError("no GPU")

    monkeypatch.setattr(torch, "open_torch", missing)
    model, lines = random_model(tmp_path / "model.m", SHAPES["mha"]), []
    backend = open_backend("auto", 1, FloatType.F32, FloatType.F32, lines.append, weights)
    assert type(backend(model, lambda *_: None)) is CpuBackend
    assert [line for line in lines if "compiling" not in line] == [] if words is None else lines[0].startswith(words)
