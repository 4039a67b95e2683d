import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from converter.huggingface import IN_LAYER, convert, interleave_pairs
from dllama.errors import FileError, FormatError
from dllama.formats import FloatType, ModelFile, quantize
from tests.converter.checkpoints import (
    CONFIGS,
    LLAMA,
    QWEN3,
    encoded,
    random_weights,
    safetensors_bytes,
    write,
    write_sparse,
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
    convert(folder, tmp_path / "a.m", FloatType.F32)
    with ModelFile(tmp_path / "a.m") as file:
        for info in file.tensors():
            stored = file.f32(info.name, info.layer)
            if info.layer is None:
                tied = info.name == "output" and config["tie_word_embeddings"]
                source = {"embedding": "model.embed_tokens", "final_norm": "model.norm", "output": "lm_head"}
                expected = weights[source["embedding" if tied else info.name] + ".weight"]
            else:
                expected = weights[f"model.layers.{info.layer}.{IN_LAYER[info.name]}"]
                if info.name in ("q", "k") and name != "qwen3":
                    expected = interleave_pairs(expected, file.config.head_dim)
            np.testing.assert_array_equal(stored, expected)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen3"])
def test_attention_scores_are_the_checkpoint_s(tmp_path, name):
    """Query times key, each turned by its position: half-split rows in the checkpoint, the file's own order in it."""
    config = CONFIGS[name]
    weights = random_weights(config)
    shape = convert(write(tmp_path / "checkpoint", config, weights), tmp_path / "a.m", FloatType.F32)
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


@pytest.mark.parametrize("weight_type", FloatType)
def test_matrices_are_quantised_and_the_rest_is_not(tmp_path, weight_type):
    weights = random_weights(QWEN3)
    convert(write(tmp_path / "checkpoint", QWEN3, weights), tmp_path / "a.m", weight_type)
    with ModelFile(tmp_path / "a.m") as file:
        v = weights["model.layers.1.self_attn.v_proj.weight"]
        np.testing.assert_array_equal(file.raw("v", 1), quantize(v, weight_type))
        np.testing.assert_array_equal(file.raw("output"), quantize(weights["model.embed_tokens.weight"], weight_type))
        np.testing.assert_array_equal(file.f32("embedding"), weights["model.embed_tokens.weight"])
        np.testing.assert_array_equal(file.f32("q_norm", 0), weights["model.layers.0.self_attn.q_norm.weight"])


def test_scales_are_searched_on_request(tmp_path):
    weights = random_weights(LLAMA)
    convert(write(tmp_path / "checkpoint", LLAMA, weights), tmp_path / "a.m", FloatType.Q40, search_scales=True)
    with ModelFile(tmp_path / "a.m") as file:
        v = weights["model.layers.0.self_attn.v_proj.weight"]
        np.testing.assert_array_equal(file.raw("v", 0), quantize(v, FloatType.Q40, search=True))
        assert (file.raw("v", 0) != quantize(v, FloatType.Q40)).any()


def test_large_tensors_in_chunks_of_whole_heads(tmp_path, monkeypatch):
    monkeypatch.setattr("converter.huggingface.CHUNK_BYTES", 5000)  # 19 rows: not a multiple of a head's 16
    weights = random_weights(LLAMA)
    reports = []
    convert(write(tmp_path / "checkpoint", LLAMA, weights), tmp_path / "a.m", FloatType.F32, progress=reports.append)
    with ModelFile(tmp_path / "a.m") as file:
        q = weights["model.layers.0.self_attn.q_proj.weight"]
        np.testing.assert_array_equal(file.f32("q", 0), interleave_pairs(q, 16))
        np.testing.assert_array_equal(file.f32("output"), weights["lm_head.weight"])
        assert sum(reports) == file.nbytes - file.header_bytes
    assert len(reports) > 40


def test_tied_checkpoints_may_store_the_output_and_computed_buffers(tmp_path):
    weights = random_weights(QWEN3)
    extra = {"lm_head.weight": weights["model.embed_tokens.weight"], "model.rotary_emb.inv_freq": np.ones(12, "f4")}
    convert(write(tmp_path / "checkpoint", QWEN3, weights | extra), tmp_path / "a.m", FloatType.Q40)
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
            "tensor model.layers.1.mlp.up_proj.weight has values that are not finite",
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
        convert(folder, tmp_path / "a.m", FloatType.Q40)
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_tensors_of_other_types_are_refused(tmp_path):
    folder = write(tmp_path / "checkpoint", LLAMA, random_weights(LLAMA))
    tensors = {name: encoded(values, "F32") for name, values in random_weights(LLAMA).items()}
    tensors["model.norm.weight"] = ("I8", (64,), bytes(64))
    (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors))
    with pytest.raises(FormatError, match="tensor model.norm.weight is I8, which is not read"):
        convert(folder, tmp_path / "a.m", FloatType.Q40)


def test_values_that_the_header_cannot_hold(tmp_path):
    folder = write(tmp_path / "checkpoint", {**LLAMA, "rope_theta": 10000.5}, random_weights(LLAMA))
    with pytest.raises(FormatError, match="config.json: rope_theta 10000.5 cannot be stored"):
        convert(folder, tmp_path / "a.m", FloatType.Q40)


def test_folders_that_are_none(tmp_path):
    with pytest.raises(FileError, match="missing: no such file or folder"):
        convert(tmp_path / "missing", tmp_path / "a.m", FloatType.Q40)
    (tmp_path / "file").touch()
    with pytest.raises(FileError, match="not a folder with a checkpoint"):
        convert(tmp_path / "file", tmp_path / "a.m", FloatType.Q40)
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileError, match="config.json: no such file"):
        convert(tmp_path / "folder", tmp_path / "a.m", FloatType.Q40)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_memory_stays_far_below_the_checkpoint(tmp_path):
    """A sparse checkpoint of 107 MB of zeros, its largest tensors 33 MB each; the memory counts mapped files too."""
    config = {**LLAMA, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1, "vocab_size": 8000,
              "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip
    folder = tmp_path / "checkpoint"
    nbytes = write_sparse(folder, config, "F32")
    script = f"""
        import re
        from pathlib import Path
        from converter import huggingface
        from dllama.formats import FloatType

        def peak_kilobytes():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

        before = peak_kilobytes()
        huggingface.THREADS, huggingface.CHUNK_BYTES = 2, 1 << 20
        huggingface.convert({str(folder)!r}, {str(tmp_path / "a.m")!r}, FloatType.Q40)
        print(peak_kilobytes() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert int(done.stdout) << 10 < 25 << 20 < 100 << 20 < nbytes


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    folder = write(tmp_path / "checkpoint", LLAMA, random_weights(LLAMA))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)); "
    run = f"from converter.cli import main; main(['hf', {str(folder)!r}, '-o', {str(tmp_path / 'a.m')!r}])"
    done = subprocess.run([sys.executable, "-c", limit + run], capture_output=True, text=True)
    assert done.returncode == 1
    assert "a.m: cannot be written: file too large" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]
