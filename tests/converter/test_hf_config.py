import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.hf_config import parse_config, read_config
from dllama.engine.rope import frequencies
from dllama.errors import FormatError
from dllama.formats import Arch, FloatType, ModelConfig, RopeType
from tests.converter.checkpoints import CONFIGS, LLAMA, LLAMA3_1, MISTRAL, QWEN3, QWEN3_MOE


def parse(values, **changes):
    return parse_config({**values, **changes}, FloatType.Q40)


def without(values, *names):
    return {name: value for name, value in values.items() if name not in names}


def test_llama():
    assert parse(LLAMA) == (
        ModelConfig(
            arch=Arch.LLAMA, dim=64, hidden_dim=96, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, vocab_size=50,
            seq_len=128, norm_epsilon=1e-5, rope_theta=10000.0, rope_type=RopeType.LLAMA, weight_type=FloatType.Q40,
        ),
        False,
    )  # fmt: skip


def test_qwen3():
    config, tied = parse(QWEN3)
    assert (config.arch, config.rope_type, config.head_dim, tied) == (Arch.QWEN3, RopeType.HALF_SPLIT, 24, True)
    assert (config.norm_epsilon, config.rope_theta) == (1e-6, 1e6)


def test_qwen3_moe():
    config, tied = parse(QWEN3_MOE)
    assert (config.arch, config.rope_type, tied) == (Arch.QWEN3_MOE, RopeType.HALF_SPLIT, False)
    assert (config.n_experts, config.n_active_experts, config.moe_hidden_dim, config.hidden_dim) == (5, 2, 64, 96)
    newer = without(QWEN3_MOE, "num_experts", "decoder_sparse_step", "mlp_only_layers") | {"num_local_experts": 5}
    assert parse(newer) == (config, tied)


def test_llama3_1_in_both_spellings():
    config, _ = parse(LLAMA3_1)
    assert (config.rope_type, config.rope_theta) == (RopeType.LLAMA3_1, 500000.0)
    assert (config.rope_scaling_factor, config.rope_scaling_orig_seq_len) == (8.0, 32)
    assert (config.rope_scaling_low_freq_factor, config.rope_scaling_high_freq_factor) == (1.0, 4.0)
    parameters = {**LLAMA3_1["rope_scaling"], "rope_theta": 500000.0}
    newer = without(LLAMA3_1, "rope_scaling", "rope_theta") | {"rope_parameters": parameters}
    assert parse(newer) == parse(LLAMA3_1)
    older = {**LLAMA3_1, "rope_scaling": without(parameters, "rope_type", "rope_theta") | {"type": "llama3"}}
    assert parse(older) == parse(LLAMA3_1)


@pytest.mark.parametrize("key", ["type", "rope_type"])
def test_linear_scaling_is_llama3_1_s_from_the_first_token_on(key):
    config, _ = parse(LLAMA, rope_scaling={key: "linear", "factor": 4.0}, rope_theta=20000.0)
    plain, _ = parse(LLAMA, rope_theta=20000.0)
    assert config.rope_type is RopeType.LLAMA3_1
    np.testing.assert_allclose(frequencies(config), frequencies(plain) / 4, rtol=1e-15)


def test_newer_spelling_without_scaling():
    plain = without(LLAMA, "rope_scaling", "rope_theta")
    config, _ = parse(plain, rope_parameters={"rope_type": "default", "rope_theta": 20000.0})
    assert (config.rope_type, config.rope_theta) == (RopeType.LLAMA, 20000.0)


def test_what_may_be_left_out():
    names = ("num_key_value_heads", "rope_theta", "rope_scaling", "tie_word_embeddings", "rms_norm_eps", "hidden_act")
    config, tied = parse(without(LLAMA, *names))
    assert (config.n_kv_heads, config.rope_theta, config.norm_epsilon, tied) == (4, 10000.0, 1e-6, False)
    assert parse(LLAMA, head_dim=None)[0].head_dim == 16
    assert parse(LLAMA, rms_norm_eps=9.999999747378752e-06)[0].norm_epsilon == 1e-5


def test_the_context_may_be_shortened_and_not_lengthened():
    assert parse_config(LLAMA, FloatType.Q40, 40)[0].seq_len == 40
    with pytest.raises(ValueError, match="a context of 129 is longer than the model's own, 128"):
        parse_config(LLAMA, FloatType.Q40, 129)


def test_a_sliding_window_converts_up_to_its_length():
    windowed = {**MISTRAL, "sliding_window": 64}
    with pytest.raises(ValueError, match=r"looks back 64 tokens only .*\(--seq-len 64\)"):
        parse(windowed)
    assert parse_config(windowed, FloatType.Q40, 64)[0].seq_len == 64
    assert parse(MISTRAL, sliding_window=128)[0].seq_len == 128
    with pytest.raises(ValueError, match="looks back 4096 tokens"):  # the library's default
        parse(without(MISTRAL, "sliding_window"), max_position_embeddings=8192)
    assert parse(QWEN3, sliding_window=64)[0].seq_len == 128  # not in use
    with pytest.raises(ValueError, match="looks back 64 tokens"):
        parse(QWEN3, sliding_window=64, use_sliding_window=True)


@pytest.mark.parametrize(
    "values, reason",
    [
        ({}, "architecture None cannot be converted"),
        ({**LLAMA, "architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel cannot be converted .known: LlamaFor"),
        ({**LLAMA, "architectures": [["LlamaForCausalLM"]]}, "cannot be converted"),
        (without(LLAMA, "hidden_size"), "hidden_size is missing"),
        ({**LLAMA, "hidden_size": "64"}, "hidden_size is '64', not a whole number"),
        ({**LLAMA, "hidden_size": 10**30}, "hidden_size is too large a number"),
        ({**LLAMA, "hidden_size": 0}, "is 0"),
        ({**LLAMA, "num_attention_heads": 0}, "cannot be split over 0 heads"),
        ({**LLAMA, "num_attention_heads": 5}, "cannot be split over 5 heads"),
        ({**LLAMA, "num_key_value_heads": 3}, "cannot be shared by 3 kv heads"),
        ({**LLAMA, "num_hidden_layers": -1}, "n_layers is -1"),
        ({**LLAMA, "intermediate_size": 100}, "hidden_dim is 100.*multiple of 32"),
        ({**LLAMA, "attention_bias": True}, "attention_bias is true"),
        ({**LLAMA, "mlp_bias": True}, "mlp_bias is true"),
        ({**LLAMA, "quantization_config": {"bits": 4}}, "a method that quantization_config does not name"),
        (
            {**LLAMA, "quantization_config": {"quant_method": "fp8"}},
            r"quantised already, by fp8: convert the original \(known: F32, F16, BF16\)",
        ),
        ({**LLAMA, "num_attention_heads": [4] * 9}, r"is \[4, 4, 4, 4, 4, 4, \.\.\.\], not a whole number"),
        ({**LLAMA, "hidden_act": "gelu"}, "hidden_act gelu is not supported"),
        ({**LLAMA, "partial_rotary_factor": 0.5}, "partial_rotary_factor"),
        ({**LLAMA, "rms_norm_eps": 1e-4}, "rms_norm_eps is 0.0001, and a .m file holds 1e-05 and 1e-06 only"),
        ({**LLAMA, "rms_norm_eps": float("nan")}, "rms_norm_eps is nan"),
        ({**LLAMA, "rope_theta": None}, "rope_theta is missing"),
        ({**LLAMA, "rope_theta": float("inf")}, "rope_theta is inf"),
        ({**LLAMA, "rope_theta": 10**400}, "rope_theta is too large a number"),
        ({**LLAMA, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling yarn is not supported"),
        ({**LLAMA, "rope_scaling": {"type": "dynamic", "factor": 4.0}}, "rope scaling dynamic is not supported"),
        (
            {**LLAMA, "rope_scaling": {"type": "linear", "factor": 2.5}},
            "linear rope scaling by 2.5, and a .m file holds",
        ),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": float("inf")}}, "linear rope scaling by inf"),
        ({**LLAMA, "rope_scaling": {"type": "linear", "factor": float("nan")}}, "linear rope scaling by nan"),
        ({**LLAMA, "rope_scaling": {"type": "linear"}}, "rope scaling factor is missing"),
        ({**QWEN3, "rope_scaling": {"type": "linear", "factor": 2.0}}, "rope scaling linear is not supported"),
        ({**LLAMA, "architectures": ["Qwen2ForCausalLM"]}, "no place for attention biases .known: LlamaFor"),
        ({**LLAMA, "rope_scaling": {"rope_type": "llama3"}}, "rope scaling factor is missing"),
        ({**LLAMA, "rope_scaling": "llama3"}, "differ between layers"),
        ({**LLAMA, "rope_parameters": {"full_attention": {}}}, "differ between layers"),
        ({**QWEN3, "rope_scaling": LLAMA3_1["rope_scaling"]}, "rope scaling llama3 is not supported"),
        (without(QWEN3_MOE, "norm_topk_prob"), "norm_topk_prob is not true"),
        ({**QWEN3_MOE, "norm_topk_prob": False}, "norm_topk_prob is not true"),
        ({**QWEN3_MOE, "decoder_sparse_step": 2}, "layers without experts"),
        ({**QWEN3_MOE, "mlp_only_layers": [0]}, "layers without experts"),
        ({**QWEN3_MOE, "n_shared_experts": 1}, "experts that all tokens share"),
        ({**QWEN3_MOE, "shared_expert_intermediate_size": 64}, "experts that all tokens share"),
        (without(QWEN3_MOE, "num_experts"), "num_experts is missing"),
        (without(QWEN3_MOE, "moe_intermediate_size"), "moe_intermediate_size is missing"),
        ({**QWEN3_MOE, "num_experts_per_tok": 6}, "n_active_experts is 6, not between 1 and 5"),
        ({**QWEN3_MOE, "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope scaling yarn is not supported"),
        ({**MISTRAL, "sliding_window": "64"}, "sliding_window is '64'"),
    ],
)
def test_refused_with_the_reason(values, reason):
    with pytest.raises(ValueError, match=reason):
        parse_config(values, FloatType.Q40)


def test_the_reason_names_the_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({**LLAMA, "mlp_bias": True}))
    with pytest.raises(FormatError, match="config.json: mlp_bias is true"):
        read_config(tmp_path, FloatType.Q40)


json_values = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=4), st.lists(st.integers(), max_size=2),
    st.dictionaries(st.sampled_from(["rope_type", "type", "factor", "rope_theta"]), st.one_of(st.floats(), st.text())),
)  # fmt: skip


@given(
    values=st.sampled_from(sorted(CONFIGS)).map(CONFIGS.get),
    changes=st.dictionaries(
        st.sampled_from([*QWEN3_MOE, "rope_parameters", "num_local_experts", "n_shared_experts"]), json_values
    ),
)
def test_any_values_give_a_config_or_a_value_error(values, changes):
    try:
        parse_config({**values, **changes}, FloatType.Q40)
    except ValueError:
        pass
