"""LoRA adapters as PEFT writes them; PEFT itself says what they mean where it is installed."""

import json

import numpy as np
import pytest

from converter.convert import Settings, convert
from dllama.errors import AdapterError, FileError
from dllama.formats import FloatType, ModelFile
from dllama.formats.safetensors import read_safetensors, write_safetensors
from dllama.lora import CONFIG_FILE, WEIGHTS_FILE, LoraAdapter, read_lora, write_lora
from dllama.targets import TARGETS
from tests.engine.adapters import Merged
from tests.engine.checkpoints import build, weights_of
from tests.engine.reference import logits
from tests.formats.models import config

MODEL = config()


def random_lora(targets=("q", "k", "v", "o"), rank=4, layers=(0, 1)) -> LoraAdapter:
    rng = np.random.default_rng(3)
    matrices = {}
    for layer in layers:
        for name in targets:
            inputs, outputs = (getattr(MODEL, width) for width in TARGETS[name][2:])
            matrices[layer, name] = (
                rng.standard_normal((rank, inputs), np.float32),
                rng.standard_normal((outputs, rank), np.float32),
            )
    return LoraAdapter(matrices, 8.0)


@pytest.mark.parametrize("targets", [("q", "k", "v", "o"), tuple(TARGETS), ("down",)])
@pytest.mark.parametrize("rank_stabilised, scale", [(False, 2.0), (True, 4.0)])
def test_what_is_written_is_read(tmp_path, targets, rank_stabilised, scale):
    adapter = random_lora(targets)
    write_lora(tmp_path / "new", LoraAdapter(adapter.matrices, 8.0, rank_stabilised), "base")
    found = read_lora(tmp_path / "new")
    found.check(MODEL)
    assert found.matrices.keys() == adapter.matrices.keys()
    for place in adapter.matrices:
        np.testing.assert_array_equal(found.a(*place), adapter.a(*place))
        np.testing.assert_array_equal(found.b(*place), adapter.b(*place))
        assert found.scale(*place) == scale


@pytest.mark.parametrize("name", ["mha", "gqa", "llama3 rope", "qwen3"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_s_logits(tmp_path, name, rslora):
    """An adapter that PEFT made and saved, and the model that it merges with it: the same as scale·B·A added to a
    converted file's matrices, in float64 numpy."""
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    peft = pytest.importorskip("peft", reason="needs peft")
    checkpoint = build(name, tmp_path / "checkpoint")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    modules = [target.module.split(".")[1] for target in TARGETS.values()]
    settings = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=modules, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    ids = np.random.default_rng(1).integers(0, 50, 20).tolist()
    with torch.no_grad():
        expected = merged(torch.tensor([ids])).logits[0].numpy()
    model_file = tmp_path / "a.m"
    convert(checkpoint, model_file, Settings(FloatType.F32))
    adapter = read_lora(tmp_path / "adapter")
    with ModelFile(model_file) as plain:
        adapter.check(plain.config)
        found = logits(Merged(plain, adapter), ids)
        assert np.abs(logits(plain, ids) - expected).max() > 0.1
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_peft_reads_what_is_written(tmp_path):
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    peft = pytest.importorskip("peft", reason="needs peft")
    checkpoint = build("gqa", tmp_path / "checkpoint")
    model = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    weight = weights_of("gqa")["model.layers.1.self_attn.k_proj.weight"]
    rng = np.random.default_rng(0)
    a, b = (rng.standard_normal(shape, np.float32) for shape in ((4, weight.shape[1]), (weight.shape[0], 4)))
    write_lora(tmp_path / "adapter", LoraAdapter({(1, "k"): (a, b)}, 6.0), str(checkpoint))
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    found = merged.model.layers[1].self_attn.k_proj.weight.detach().numpy()
    np.testing.assert_allclose(found, weight + 1.5 * b @ a, rtol=1e-4, atol=1e-5)
    untouched = merged.model.layers[0].self_attn.k_proj.weight.detach().numpy()
    np.testing.assert_array_equal(untouched, weights_of("gqa")["model.layers.0.self_attn.k_proj.weight"])


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"peft_type": "LOHA"}, "peft_type is 'LOHA': only LORA is supported"),
        ({"use_dora": True}, "use_dora is set: DoRA also scales"),
        ({"bias": "all"}, "bias is 'all': a .m file has no place for biases"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save is set: it replaces whole matrices"),
        ({"alpha_pattern": {"q_proj": 3}}, "alpha_pattern is set"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights is 'pissa', which changes the base model"),
        ({"init_lora_weights": ["x"]}, "init_lora_weights is"),
        ({"lora_alpha": None}, "lora_alpha is None, not a number"),
        ({"lora_alpha": float("inf")}, "lora_alpha is inf, not a number"),
        ({"r": 0}, "r is 0, not a whole number above 0"),
        ({"r": 8}, "k of layer 0 has rank 4, adapter_config.json says 8"),
    ],
)
def test_settings_that_are_not_supported(tmp_path, settings, said):
    write_lora(tmp_path, random_lora(), "base")
    path = tmp_path / CONFIG_FILE
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    with pytest.raises(AdapterError, match=said):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda tensors: tensors.clear(), "holds no matrices"),
        (lambda tensors: tensors.pop(next(iter(tensors))), "lacks its counterpart"),
        (
            lambda tensors: tensors.update({"base_model.model.lm_head.lora_A.weight": np.zeros((4, 9), np.float32)}),
            "lm_head.lora_A.weight is not A or B of a known matrix",
        ),
        (
            lambda tensors: tensors.update({next(iter(tensors)): np.zeros((5, 64), np.float32)}),
            r"is \[5, 64\] and .* \[96, 4\]: no rank in common",
        ),
        (
            lambda tensors: tensors.update({next(iter(tensors)): np.full((4, 64), np.nan, np.float32)}),
            "layers.0.self_attn.q_proj.lora_A.weight has values that are not finite",
        ),
    ],
)
def test_weights_that_make_no_adapter(tmp_path, change, said):
    write_lora(tmp_path, random_lora(), "base")
    tensors = {name: tensor.values() for name, tensor in read_safetensors(tmp_path / WEIGHTS_FILE).items()}
    change(tensors)
    write_safetensors(tmp_path / WEIGHTS_FILE, tensors, {})
    with pytest.raises((AdapterError, FileError), match=said):
        read_lora(tmp_path)


def test_files_that_are_missing(tmp_path):
    with pytest.raises(FileError, match="adapter_config.json: no such file"):
        read_lora(tmp_path)
    write_lora(tmp_path, random_lora(), "base")
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(FileError, match="adapter_model.bin: a torch file"):
        read_lora(tmp_path)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"n_layers": 1}, "the adapter: adds to layer 1, and the model has 1"),
        ({"dim": 32}, "for a model whose q takes 64 values and gives 96, and it is 32 and 96 here"),
    ],
)
def test_another_model(changes, said):
    with pytest.raises(AdapterError, match=said):
        random_lora().check(config(**changes))
