"""Edge and cloud against transformers, with the adapter merged into the model's own matrices."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="needs torch: pip install '.[train]'")
pytest.importorskip("transformers", reason="it is compared with: pip install '.[train]'")

from dllama.embedded import model_path  # noqa: E402
from dllama.formats import ModelFile  # noqa: E402
from dllama.privatelora.adapter import write_adapter  # noqa: E402
from dllama.targets import TARGETS  # noqa: E402
from dllama.train.base_model import load_base  # noqa: E402
from tests.privatelora.adapters import strong_halves  # noqa: E402
from tests.privatelora.nodes import CloudProcess, open_llama  # noqa: E402

PROMPT = "Question: Tom has 3 apples and buys 4 more. How many apples does Tom have?"


def logits(model, ids) -> np.ndarray:
    """float32 [tokens, vocab]"""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].numpy()


@pytest.mark.parametrize("layers", [(0, 0), (1, 1)])
def test_logits_are_those_of_the_merged_model(tmp_path, layers):
    cloud_half, edge_half = strong_halves(ModelFile(model_path()).config, tuple(TARGETS), ranks=(64, 32))
    write_adapter(tmp_path, cloud_half, edge_half)
    with CloudProcess(model_path()) as cloud:
        with open_llama(cloud.address, adapter=tmp_path, edge_layers=layers, kv_float_type="f32") as llama:
            ids = llama.encode(PROMPT)
            found = llama.logits(ids)
    model = load_base(None, None, torch.float32).model.eval()
    plain = logits(model, ids)
    for layer, target in cloud_half.shape.places():
        matrices = cloud_half.b(layer, target), edge_half.m(layer, target), cloud_half.a(layer, target)
        weight = model.model.layers[layer].get_submodule(TARGETS[target].module).weight
        weight.data += torch.from_numpy(np.linalg.multi_dot(matrices))
    expected = logits(model, ids)
    assert abs(found - expected).max() < 1e-3 * abs(expected).max()
    assert abs(plain - expected).max() > 0.1 * abs(expected).max(), "an adapter that does nothing would pass"
