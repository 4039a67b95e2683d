import json

import numpy as np
import pytest

from converter.convert import Settings, convert
from converter.huggingface import checkpoint_name, read_tensors
from dllama.errors import FileError, FormatError
from dllama.formats import FloatType, ModelFile
from dllama.formats.rotary import interleave_pairs
from tests.converter.checkpoints import (
    CONFIGS,
    LLAMA,
    QWEN3,
    encoded,
    random_weights,
    safetensors_bytes,
    write,
)


def rotate(heads: np.ndarray, position: int, theta: float, half_split: bool) -> np.ndarray:
    """Rotary embedding (Su et al., 2021) of float64 [n_heads, head_dim] at a position."""
    head_dim = heads.shape[1]
    angles = position * theta ** (-np.arange(0, head_dim, 2) / head_dim)
    turn = np.exp(1j * angles)
    if half_split:
        turned = (heads[:, : head_dim // 2] + 1j * heads[:, head_dim // 2 :]) * turn
        return np.concatenate([turned.real, turned.imag], axis=1)
    turned = (heads[:, ::2] + 1j * heads[:, 1::2]) * turn
    return np.stack([turned.real, turned.imag], axis=2).reshape(heads.shape)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("dtype, shards", [("F32", 1), ("BF16", 3), ("F16", 1)])
def test_every_tensor_arrives(tmp_path, name, dtype, shards):
    config = CONFIGS[name]
    weights = random_weights(config, dtype)
    folder = write(tmp_path / "checkpoint", config, weights, dtype, shards)
    convert(folder, tmp_path / "a.m", Settings(FloatType.F32))
    with ModelFile(tmp_path / "a.m") as file:
        for info in file.tensors():
            stored = file.f32(info.name, info.layer)
            if info.layer is None:
                tied = info.name == "output" and config["tie_word_embeddings"]
                source = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "output": "lm_head"}
                expected = weights[source["embedding" if tied else info.name] + ".weight"]
            else:
                expected = weights[checkpoint_name(info, False)]
                if info.name in ("q", "k") and not name.startswith("qwen3"):
                    expected = interleave_pairs(expected, file.config.head_dim)
            np.testing.assert_array_equal(stored, expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_attention_scores_are_the_checkpoint_s(tmp_path, name):
    """Query times key, each turned by its position: half-split rows in the checkpoint, the file's own order in it."""
    config = CONFIGS[name]
    weights = random_weights(config)
    shape = convert(write(tmp_path / "checkpoint", config, weights), tmp_path / "a.m", Settings(FloatType.F32)).config
    x, y = np.random.default_rng(1).standard_normal((2, shape.dim))

    def scores(w_q, w_k, half_split):
        q = rotate((w_q.astype(np.float64) @ x).reshape(shape.n_heads, -1), 7, shape.rope_theta, half_split)
        k = rotate((w_k.astype(np.float64) @ y).reshape(shape.n_kv_heads, -1), 3, shape.rope_theta, half_split)
        return q @ k.T

    with ModelFile(tmp_path / "a.m") as file:
        for layer in range(shape.n_layers):
            prefix = f"model.layers.{layer}.self_attn."
            expected = scores(weights[prefix + "q_proj.weight"], weights[prefix + "k_proj.weight"], True)
            found = scores(file.f32("q", layer), file.f32("k", layer), name == "qwen3")
            np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


def test_tied_checkpoints_may_store_the_output_and_computed_buffers(tmp_path):
    weights = random_weights(QWEN3)
    extra = {"lm_head.weight": weights["model.embed_tokens.weight"], "model.rotary_emb.inv_freq": np.ones(12, "f4")}
    convert(write(tmp_path / "checkpoint", QWEN3, weights | extra), tmp_path / "a.m", Settings(FloatType.Q40))
    assert (tmp_path / "a.m").exists()


@pytest.mark.parametrize(
    "change, reason",
    [
        (lambda w: w.pop("lm_head.weight"), "checkpoint: tensor lm_head.weight is missing"),
        (
            lambda w: w.update({"model.norm.weight": np.ones(63, "f4")}),
            r"model.safetensors: tensor model.norm.weight is \[63\], config.json calls for \[64\]",
        ),
        (
            lambda w: w.update({"model.layers.0.self_attn.q_proj.bias": np.ones(64, "f4")}),
            "tensor model.layers.0.self_attn.q_proj.bias has no place in this architecture",
        ),
        (
            lambda w: w["model.layers.1.mlp.up_proj.weight"].__setitem__((95, 63), np.nan),
            r"tensor model.layers.1.mlp.up_proj.weight has values that are not finite .* \(--allow-non-finite writes",
        ),
        (
            lambda w: w["model.norm.weight"].__setitem__(5, np.inf),
            "tensor model.norm.weight has values that are not finite",
        ),
        (
            lambda w: w["lm_head.weight"].__setitem__((0, 0), 1e9),
            "tensor lm_head.weight has a block scale beyond 65504",
        ),
    ],
)
def test_a_wrong_tensor_is_named_and_nothing_is_written(tmp_path, change, reason):
    weights = random_weights(LLAMA)
    change(weights)
    folder = write(tmp_path / "checkpoint", LLAMA, weights)
    with pytest.raises(FileError, match=reason):
        convert(folder, tmp_path / "a.m", Settings(FloatType.Q40))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_tensors_of_other_types_are_refused(tmp_path):
    folder = write(tmp_path / "checkpoint", LLAMA, random_weights(LLAMA))
    tensors = {name: encoded(values, "F32") for name, values in random_weights(LLAMA).items()}
    tensors["model.norm.weight"] = ("I8", (64,), bytes(64))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    with pytest.raises(FormatError, match="tensor model.norm.weight is I8, which is not read"):
        convert(folder, tmp_path / "a.m", Settings(FloatType.Q40))


def test_values_that_the_header_cannot_hold(tmp_path):
    folder = write(tmp_path / "checkpoint", {**LLAMA, "rope_theta": 10000.5}, random_weights(LLAMA))
    with pytest.raises(FormatError, match="config.json: rope_theta 10000.5 cannot be stored"):
        convert(folder, tmp_path / "a.m", Settings(FloatType.Q40))


@pytest.mark.parametrize("form", ["safetensors", "bin"])
@pytest.mark.parametrize("shards", [1, 3])
def test_tensors_come_back_whatever_the_file(tmp_path, form, shards):
    weights = random_weights(LLAMA, "F16")
    tensors, files = read_tensors(write(tmp_path / "checkpoint", LLAMA, weights, "F16", shards, form))
    assert tensors.keys() == weights.keys() and len(files) == (1 if shards == 1 else shards + 1)
    for name, values in weights.items():
        rows = np.atleast_2d(values)
        np.testing.assert_array_equal(tensors[name].rows(0, len(rows)), rows)


def test_safetensors_come_first(tmp_path):
    folder = write(tmp_path / "checkpoint", LLAMA, random_weights(LLAMA))
    (folder / "pytorch_model.bin").touch()
    assert read_tensors(folder)[1] == [folder / "model.safetensors"]


@pytest.mark.parametrize(
    "index, reason",
    [
        ({}, "has no weight_map"),
        ({"weight_map": {"a": "../secret"}}, "'../secret', which is not a plain file name"),
        ({"weight_map": {"a": 5}}, "a file 5"),
        ({"weight_map": {"a": ".."}}, "not a plain file name"),
        ({"weight_map": {"a": "missing.safetensors"}}, "missing.safetensors: no such file"),
        ({"weight_map": {"c": "shard.safetensors"}}, "shard.safetensors: lacks tensor c"),
        (
            {"weight_map": {"a": "shard.safetensors"}},
            "shard.safetensors: holds tensor b, which model.safetensors.index",
        ),
        (
            {"weight_map": {"a": "shard.safetensors", "b": "other.safetensors"}},
            "shard.safetensors: holds tensor b, which model.safetensors.index.json does not place there",
        ),
    ],
)
def test_indexes_refused_with_the_reason(tmp_path, index, reason):
    one = ("F32", (1,), bytes(4))
    (tmp_path / "shard.safetensors").write_bytes(safetensors_bytes({"a": one, "b": one, "rotary_emb.inv_freq": one}))
    (tmp_path / "other.safetensors").write_bytes(safetensors_bytes({"b": one}))
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(FileError, match=reason):
        read_tensors(tmp_path)


def test_a_folder_without_weights(tmp_path):
    with pytest.raises(FileError, match=r"neither model.safetensors nor pytorch_model.bin, nor an index of one"):
        read_tensors(tmp_path)
