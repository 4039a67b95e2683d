import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.convert import Settings, convert
from converter.meta import hidden_dim, parse_params, usual_context
from dllama.errors import FileError
from dllama.formats import FloatType, ModelConfig, RopeType
from tests.converter.checkpoints import LLAMA, random_weights, write, write_meta, write_torch
from tests.converter.torch_files import archive, state_pickle, tensor_pickle

LLAMA_2_7B = {"dim": 4096, "multiple_of": 256, "n_heads": 32, "n_layers": 32, "norm_eps": 1e-05, "vocab_size": -1}
LLAMA_2_70B = {
    "dim": 8192, "multiple_of": 4096, "ffn_dim_multiplier": 1.3, "n_heads": 64, "n_kv_heads": 8, "n_layers": 80,
    "norm_eps": 1e-05, "vocab_size": -1,
}  # fmt: skip
LLAMA_3_8B = {
    "dim": 4096, "n_layers": 32, "n_heads": 32, "n_kv_heads": 8, "vocab_size": 128256, "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3, "norm_eps": 1e-05, "rope_theta": 500000.0,
}  # fmt: skip
LLAMA_3_1_8B = LLAMA_3_8B | {"use_scaled_rope": True}
LLAMA_3_2_1B = LLAMA_3_1_8B | {"dim": 2048, "n_layers": 16, "multiple_of": 256, "ffn_dim_multiplier": 1.5}
WIDE = LLAMA | {"num_attention_heads": 8, "num_key_value_heads": 4, "vocab_size": 64, "intermediate_size": 96}


def parse(values, rows=32000, seq_len=None, **changes) -> ModelConfig:
    return parse_params(values | changes, FloatType.Q40, rows, seq_len)


def test_llama_2():
    small, large = parse(LLAMA_2_7B), parse(LLAMA_2_70B)
    assert (small.dim, small.hidden_dim, small.n_kv_heads, small.vocab_size, small.seq_len) == (
        4096, 11008, 32, 32000, 4096,
    )  # fmt: skip
    assert (small.rope_type, small.rope_theta, small.norm_epsilon) == (RopeType.LLAMA, 10000.0, 1e-5)
    assert (large.hidden_dim, large.n_kv_heads, large.head_dim) == (28672, 8, 128)


def test_llama_3():
    plain, scaled, small = parse(LLAMA_3_8B, 128256), parse(LLAMA_3_1_8B, 128256), parse(LLAMA_3_2_1B, 128256)
    assert (plain.hidden_dim, plain.rope_theta, plain.rope_type, plain.seq_len) == (14336, 5e5, RopeType.LLAMA, 8192)
    assert (scaled.rope_type, scaled.rope_scaling_factor, scaled.seq_len) == (RopeType.LLAMA3_1, 8.0, 131072)
    assert (scaled.rope_scaling_low_freq_factor, scaled.rope_scaling_high_freq_factor) == (1.0, 4.0)
    assert scaled.rope_scaling_orig_seq_len == 8192
    assert (small.hidden_dim, small.rope_scaling_factor) == (8192, 32.0)


@pytest.mark.parametrize("dim, hidden", [(4096, 11008), (5120, 13824), (6656, 17920), (8192, 22016)])
def test_the_hidden_sizes_of_llama_1(dim, hidden):
    assert hidden_dim({"multiple_of": 256}, dim) == hidden


def test_contexts():
    assert usual_context(False, 10000.0, 1e-6) == 2048  # Llama 1
    assert usual_context(False, 1e6, 1e-5) == 16384  # Code Llama
    assert parse(LLAMA_2_7B, max_seq_len=1024).seq_len == 1024
    assert parse(LLAMA_2_7B, seq_len=512).seq_len == 512


@pytest.mark.parametrize("shards, split_rows", [(1, False), (2, False), (2, True), (4, False), (4, True)])
@pytest.mark.parametrize("weight_type", [FloatType.F32, FloatType.Q40])
def test_shards_give_the_bytes_of_the_hugging_face_checkpoint(tmp_path, shards, split_rows, weight_type):
    """The same weights, as Meta's code and as transformers would save them; the engine's tests compare the latter's
    logits with transformers'."""
    config = WIDE | {"hidden_size": 128, "intermediate_size": 128}
    weights = random_weights(config, "F16")
    convert(write(tmp_path / "hf", config, weights, "F16"), tmp_path / "hf.m", Settings(weight_type))
    folder = write_meta(tmp_path / "meta", config, weights, shards, split_rows)
    result = convert(folder, tmp_path / "meta.m", Settings(weight_type))
    assert (result.kind, result.config.vocab_size) == ("Meta folder", 64)
    assert (tmp_path / "meta.m").read_bytes() == (tmp_path / "hf.m").read_bytes()


def test_scaled_rope(tmp_path):
    scaling = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": 8192}  # fmt: skip
    config = LLAMA | {"rope_theta": 500000.0, "rope_scaling": scaling}
    weights = random_weights(config)
    convert(write(tmp_path / "hf", config, weights), tmp_path / "hf.m")
    convert(write_meta(tmp_path / "meta", config, weights), tmp_path / "meta.m")
    assert (tmp_path / "meta.m").read_bytes() == (tmp_path / "hf.m").read_bytes()


@pytest.fixture
def folder(tmp_path):
    """Four shards of a llama."""
    return write_meta(tmp_path / "meta", WIDE, random_weights(WIDE), 4)


def refusal(folder) -> str:
    with pytest.raises(FileError) as caught:
        convert(folder, folder.parent / "a.m", Settings(FloatType.F32))
    assert not (folder.parent / "a.m").exists()
    return str(caught.value)


@pytest.mark.parametrize(
    "rank, reason",
    [
        (0, "consolidated.00.pth: is missing, and consolidated.03.pth is there"),
        (2, "consolidated.02.pth: is missing, and consolidated.03.pth is there"),
        (3, "meta: holds 3 shards, and params.json with the size of the first calls for 4"),
    ],
)
def test_a_missing_shard_is_named(folder, rank, reason):
    (folder / f"consolidated.{rank:02}.pth").unlink()
    assert reason in refusal(folder)


def other_shard(folder, **changes):
    """Put in place of the third shard that of a model of other sizes or weights."""
    config = WIDE | changes
    weights = random_weights(config, seed=1)
    if changes:  # of one family, with the same norms
        norms = {name: values for name, values in random_weights(WIDE).items() if values.ndim == 1}
        weights |= {name: values for name, values in norms.items() if name in weights}
    other = write_meta(folder.parent / "other", config, weights, 4)
    (folder / "consolidated.02.pth").write_bytes((other / "consolidated.02.pth").read_bytes())


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({}, "tensor layers.0.attention_norm.weight is not that of consolidated.00.pth: shards of different models"),
        ({"intermediate_size": 128}, r"w2.weight is F32 [64, 32], and F32 [64, 24] in consolidated.00.pth: shards of"),
        ({"num_hidden_layers": 1}, "lacks tensor layers.1.attention.wk.weight, which consolidated.00.pth has: shards"),
        ({"num_hidden_layers": 3}, "has tensor layers.2.attention.wk.weight, which consolidated.00.pth lacks: shards"),
    ],
)
def test_shards_of_different_models(folder, changes, reason):
    other_shard(folder, **changes)
    message = refusal(folder)
    assert "consolidated.02.pth: " in message and reason in message


def test_a_tensor_missing_extra_or_of_the_wrong_shape(tmp_path):
    weights = random_weights(LLAMA)
    folder = write_meta(tmp_path / "meta", LLAMA, weights)
    params = json.loads((folder / "params.json").read_text())
    (folder / "params.json").write_text(json.dumps(params | {"n_layers": 3}))
    assert "meta: tensor layers.2.attention.wq.weight is missing" in refusal(folder)
    (folder / "params.json").write_text(json.dumps(params | {"n_layers": 1}))
    assert "consolidated.00.pth: tensor layers.1.attention_norm.weight has no place" in refusal(folder)
    (folder / "params.json").write_text(json.dumps(params | {"n_kv_heads": 4}))
    assert "tensor layers.0.attention.wk.weight is [32, 64], params.json calls for [64, 64]" in refusal(folder)


def test_values_that_are_not_finite(folder):
    weights = random_weights(WIDE)
    weights["model.layers.1.mlp.down_proj.weight"][3, 60] = np.nan  # in the columns of the third shard
    write_meta(folder, WIDE, weights, 4)
    assert "tensor layers.1.feed_forward.w2.weight has values that are not finite" in refusal(folder)


def test_nothing_of_the_pickle_is_run(folder):
    (folder / "consolidated.01.pth").write_bytes(archive(b"\x80\x02cposix\nsystem\nX\x04\0\0\0true\x85R.", {}))
    assert "consolidated.01.pth: refused: its pickle asks for posix.system" in refusal(folder)


def test_shards_that_lack_the_essential_tensors(tmp_path):
    folder = write_meta(tmp_path / "meta", LLAMA, random_weights(LLAMA))
    write_torch(folder / "consolidated.00.pth", {"norm.weight": np.ones(64, np.float32)})
    assert "consolidated.00.pth: tensor output.weight is missing or not a matrix" in refusal(folder)
    write_torch(folder / "consolidated.00.pth", {"output.weight": np.ones((50, 64), np.float32)})
    assert "consolidated.00.pth: tensor layers.0.feed_forward.w1.weight is missing or empty" in refusal(folder)
    scalar = tensor_pickle("I64", "0", 1, 0, (), ())
    (folder / "consolidated.00.pth").write_bytes(archive(state_pickle({"output.weight": scalar}), {"0": bytes(8)}))
    assert "consolidated.00.pth: tensor output.weight is missing or not a matrix" in refusal(folder)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dim": None}, "dim is missing"),
        ({"dim": "4096"}, "dim is '4096', not a whole number"),
        ({"n_heads": 0}, "dim 4096 cannot be split over 0 heads"),
        ({"n_heads": 48}, "dim 4096 cannot be split over 48 heads"),
        ({"n_kv_heads": 5}, "cannot be shared by 5 kv heads"),
        ({"vocab_size": 32001}, "vocab_size is 32001, and the shards hold 32000 rows of the output matrix"),
        ({"multiple_of": 0}, "multiple_of is 0"),
        ({"ffn_dim_multiplier": math.inf}, "ffn_dim_multiplier is inf"),
        ({"ffn_dim_multiplier": "1.3"}, "ffn_dim_multiplier is '1.3', not a number"),
        ({"norm_eps": 1e-4}, "norm_eps is 0.0001, and a .m file holds 1e-05 and 1e-06 only"),
        ({"rope_theta": math.nan}, "rope_theta is nan"),
        ({"moe": {"num_experts": 8}}, "moe is set, and such a model cannot be converted"),
        ({"quantization_args": {"scheme": "int4"}}, "quantization_args is set"),
        ({"vision_chunk_size": 448}, "vision_chunk_size is set"),
    ],
)
def test_params_refused_with_the_reason(changes, reason):
    with pytest.raises(ValueError, match=reason):
        parse(LLAMA_2_7B, **changes)


def test_a_context_is_not_lengthened():
    with pytest.raises(ValueError, match="a context of 4097 is longer than the model's own, 4096"):
        parse(LLAMA_2_7B, seq_len=4097)


def test_the_reason_names_the_file(folder):
    (folder / "params.json").write_text("{")
    assert "params.json: not JSON" in refusal(folder)
    (folder / "params.json").write_text(json.dumps(LLAMA_2_7B | {"n_heads": 0}))
    assert "params.json: dim 4096 cannot be split" in refusal(folder)


@given(
    values=st.sampled_from([LLAMA_2_70B, LLAMA_3_1_8B]),
    changes=st.dictionaries(
        st.sampled_from([*LLAMA_3_1_8B, "max_seq_len", "hidden_dim", "head_dim"]),
        st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3), st.just([])),
    ),
)
def test_any_values_give_a_config_or_a_value_error(values, changes):
    try:
        parse_params(values | changes, FloatType.Q40, 32000)
    except ValueError:
        pass
