"""The modules against the matrices that they stand for, and what they become on disk and in a `.m` file."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch: pip install '.[train]'")
pytest.importorskip("transformers", reason="training needs transformers: pip install '.[train]'")

from converter.convert import Settings, convert  # noqa: E402
from dllama.errors import ModelError  # noqa: E402
from dllama.formats import FloatType, ModelFile  # noqa: E402
from dllama.lora import read_lora, write_lora  # noqa: E402
from dllama.privatelora.adapter import CLOUD_FILE, EDGE_FILE, CloudAdapter, read_cloud, read_edge, write_adapter  # noqa: E402
from dllama.targets import TARGETS  # noqa: E402
from dllama.train.adapters import add_lora, add_private_lora, edge_adapter, lora_adapter, shape_for  # noqa: E402
from tests.engine.reference import logits  # noqa: E402
from tests.train.models import tiny_model  # noqa: E402

IDS = list(range(20))


def logits_of(model) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def assert_close(found, expected, tolerance=1e-5):
    assert np.linalg.norm(found - expected) < tolerance * np.linalg.norm(expected)


def randomise(modules, names, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for module in modules.values():
        for name in names:
            parameter = getattr(module, name)
            parameter.data = torch.randn(parameter.shape, generator=generator) * 3


class Merged:
    """A model file with something added to its matrices, as far as the reference reads it."""

    def __init__(self, file: ModelFile, added):
        self._file, self._added = file, added
        self.config, self.tensors = file.config, file.tensors

    def f32(self, name: str, layer: int | None = None) -> np.ndarray:
        values = self._file.f32(name, layer)
        target = next((target for target, known in TARGETS.items() if known.matrix == name), None)
        return values + self._added(layer, target) if target and layer is not None else values


@pytest.mark.parametrize("name", ["gqa", "llama3 rope", "qwen3"])
def test_a_trained_adapter_is_w_plus_b_m_a_in_transformers_and_in_the_model_file(tmp_path, name):
    """The module, the merged matrices in transformers, and those of a converted file with the adapter read back."""
    model = tiny_model(tmp_path / "model", name)
    plain = logits_of(model)
    shape = shape_for(model, 8, 6, tuple(TARGETS))
    cloud = CloudAdapter(shape, seed=5)
    modules = add_private_lora(model, cloud)
    np.testing.assert_array_equal(logits_of(model), plain)  # M is zero at the start
    randomise(modules, "m")
    found = logits_of(model)
    assert np.abs(found - plain).max() > 0.01
    edge = edge_adapter(modules, cloud, np.float32)

    merged = tiny_model(tmp_path / "model", name)
    for layer, target in shape.places():
        update = cloud.b(layer, target) @ edge.m(layer, target) @ cloud.a(layer, target)
        merged.model.layers[layer].get_submodule(TARGETS[target].module).weight.data += torch.from_numpy(update)
    assert_close(found, logits_of(merged))

    write_adapter(tmp_path / "adapter", cloud, edge)
    cloud, edge = read_cloud(tmp_path / "adapter" / CLOUD_FILE), read_edge(tmp_path / "adapter" / EDGE_FILE)
    convert(tmp_path / "model", tmp_path / "a.m", Settings(FloatType.F32))
    with ModelFile(tmp_path / "a.m") as file:
        cloud.check(file.config)
        edge.check(file.config)

        def added(layer, target):
            b = cloud.b_in_model(layer, target, file.config)
            return b @ edge.m(layer, target) @ cloud.a(layer, target)

        assert_close(found, logits(Merged(file, added), IDS))


def test_a_trained_lora_comes_back(tmp_path):
    model = tiny_model(tmp_path / "model")
    plain = logits_of(model)
    modules = add_lora(model, shape_for(model, 4, 4, ("q", "k", "down"), [1]), alpha=6.0, seed=1)
    np.testing.assert_array_equal(logits_of(model), plain)  # B is zero at the start
    randomise(modules, ("a", "b"))
    found = logits_of(model)
    write_lora(tmp_path / "adapter", lora_adapter(modules, 6.0), "tiny")
    adapter = read_lora(tmp_path / "adapter")
    assert set(adapter.matrices) == {(1, "q"), (1, "k"), (1, "down")}
    merged = tiny_model(tmp_path / "model")
    for layer, target in adapter.matrices:
        update = adapter.scale(layer, target) * adapter.b(layer, target) @ adapter.a(layer, target)
        merged.model.layers[layer].get_submodule(TARGETS[target].module).weight.data += torch.from_numpy(update)
    assert_close(found, logits_of(merged))


def test_a_lora_begins_as_its_seed_says(tmp_path):
    starts = []
    for seed in (1, 1, 2):
        model = tiny_model(tmp_path / "model")
        modules = add_lora(model, shape_for(model, 4, 4, ("q",)), alpha=8.0, seed=seed)
        starts.append(modules[0, "q"].a.detach().numpy())
    np.testing.assert_array_equal(starts[0], starts[1])
    assert not np.array_equal(starts[0], starts[2])
    bound = 1 / np.sqrt(starts[0].shape[1])
    assert abs(starts[0]).max() <= bound and abs(starts[0]).max() > 0.9 * bound


def test_in_bfloat16_what_is_trained_stays_exact(tmp_path):
    model = tiny_model(tmp_path / "model").to(torch.bfloat16)
    modules = add_private_lora(model, CloudAdapter(shape_for(model, 8, 6, ("q", "v")), seed=5))
    module = modules[0, "q"]
    assert (module.a.dtype, module.b.dtype, module.m.dtype) == (torch.bfloat16, torch.bfloat16, torch.float32)
    assert model(torch.tensor([IDS])).logits.dtype == torch.bfloat16


def test_only_the_adapter_is_trained(tmp_path):
    model = tiny_model(tmp_path / "model")
    shape = shape_for(model, 8, 6, ("q", "k", "v"))
    modules = add_private_lora(model, CloudAdapter(shape, seed=5))
    trained = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == shape.n_trained == 2 * 3 * 48
    assert {id(p) for p in trained} == {id(module.m) for module in modules.values()}


@pytest.mark.parametrize(
    "arguments, said",
    [
        ((8, 8, ("q",), [2]), "its layers are not those of a model of 2"),
        ((9000, 8, ("q",)), "r_c2d is 9000, not between 1 and 8192"),
    ],
)
def test_shapes_that_the_model_has_not(tmp_path, arguments, said):
    with pytest.raises(ModelError, match=said):
        shape_for(tiny_model(tmp_path / "model"), *arguments)


def test_a_model_of_other_layers_is_refused():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    sizes = dict(vocab_size=20, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    model = Qwen2ForCausalLM(Qwen2Config(**sizes, num_key_value_heads=1))
    with pytest.raises(ModelError, match="layer 0 of this qwen2 model has no self_attn.q_proj without bias"):
        shape_for(model, 4, 4, ("q",))
