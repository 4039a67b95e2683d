import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.formats import Activation, Arch, FloatType, RopeType
from dllama.formats.header import EPSILONS, KEYS, MAGIC, MAX_HEADER_BYTES, pack_header, unpack_header
from tests.formats.models import LLAMA, LLAMA3_1, QWEN3, SHAPES, config

BASE = {
    "version": 0, "architecture": 0xABCD00, "dim": 64, "hidden_dim": 96, "n_layers": 2, "n_heads": 4, "n_kv_heads": 2,
    "n_experts": 0, "n_active_experts": 0, "vocab_size": 50, "seq_len": 77, "activation": 1, "rope_theta": 10000,
    "weight_type": 2,
}  # fmt: skip
MIXTURE = {"architecture": 0xABCD02, "n_experts": 4, "n_active_experts": 2, "moe_hidden_dim": 32}


def header(values: dict | list) -> bytes:
    """A header of these pairs; names or numbers as keys."""
    pairs = values.items() if isinstance(values, dict) else values
    body = b"".join(struct.pack("<ii", KEYS.index(k) if isinstance(k, str) else k, v) for k, v in pairs)
    return struct.pack("<ii", MAGIC, 8 + len(body)) + body


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_type", FloatType)
def test_round_trip(shape, weight_type):
    model = config(SHAPES[shape], weight_type, activation=Activation.GELU)
    data = pack_header(model)
    assert unpack_header(data) == (model, len(data))
    assert len(data) <= MAX_HEADER_BYTES


def test_what_a_header_may_leave_out():
    bare = {name: value for name, value in BASE.items() if name not in ("version", "activation", "rope_theta")}
    model, size = unpack_header(header(bare))
    assert size == len(header(bare))
    assert (model.head_dim, model.norm_epsilon, model.rope_theta) == (16, EPSILONS[5], 10000.0)
    assert (model.rope_type, model.activation) == (RopeType.LLAMA, Activation.SILU)


@pytest.mark.parametrize("change", [{"architecture": 0xABCD01}, MIXTURE])
def test_qwen3_is_half_split_whether_or_not_it_says_so(change):
    for pairs in (change, {**change, "rope_type": 0}, {**change, "rope_type": 1}):
        assert unpack_header(changed(**pairs))[0].rope_type is RopeType.HALF_SPLIT


def test_a_mixture_of_experts_has_rows_of_its_experts_own_width():
    """Of ``hidden_dim``, which Distributed Llama's files have besides, no tensor is."""
    model, _ = unpack_header(changed(**MIXTURE, hidden_dim=100))
    assert (model.arch, model.n_experts, model.n_active_experts) == (Arch.QWEN3_MOE, 4, 2)
    assert (model.hidden_dim, model.moe_hidden_dim, model.ffn_dim) == (100, 32, 32)


def test_a_scaling_factor_alone_means_llama3_1():
    scaling = {
        "rope_scaling_factor": 32,
        "rope_scaling_low_freq_factor": 1,
        "rope_scaling_high_freq_factor": 4,
        "rope_scaling_orig_seq_len": 8192,
    }
    for pairs in ({**BASE, **scaling}, {**BASE, **scaling, "rope_type": 2}):
        model = unpack_header(header(pairs))[0]
        assert (model.rope_type, model.rope_scaling_factor) == (RopeType.LLAMA3_1, 32.0)
    for factor in (0, 1):  # no scaling
        model = unpack_header(header({**BASE, **scaling, "rope_scaling_factor": factor}))[0]
        assert (model.rope_type, model.rope_scaling_factor) == (RopeType.LLAMA, 0.0)


def changed(**values):
    return header({**BASE, **values})


def mixture(**values):
    return changed(**{**MIXTURE, **values})


def without(name):
    return header({key: value for key, value in BASE.items() if key != name})


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not a model: 0 bytes"),
        (b"\x7fELF" + bytes(60), "not a model: it starts with 0x464c457f"),
        (struct.pack("<10i", 0x00ABCD00, *range(9)), "old header.*convert the model again"),
        (struct.pack("<i", MAGIC), "truncated inside its header"),
        (struct.pack("<ii", MAGIC, 8), "header size 8"),
        (struct.pack("<ii", MAGIC, -8), "header size -8"),
        (struct.pack("<ii", MAGIC, 2**31 - 8), "header size 2147483640"),
        (struct.pack("<ii", MAGIC, 20) + bytes(12), "header size 20"),
        (header(BASE)[:-4], "truncated inside its header"),
        (header({**BASE, 22: 1}), "unknown header key 22"),
        (header({**BASE, -1: 1}), "unknown header key -1"),
        (header([*BASE.items(), ("dim", 64)]), r"key 2 \(dim\) appears twice"),
        (changed(version=7), "header version 7"),
        (changed(architecture=0xABCD77), "unknown architecture 0xabcd77"),
        (changed(n_experts=8), "n_experts is 8, and llama has no experts"),
        (changed(n_active_experts=1), "n_active_experts is 1, and llama has no experts"),
        (changed(moe_hidden_dim=32), "moe_hidden_dim is 32, and llama has no experts"),
        (mixture(n_experts=0), "n_experts is 0"),
        (mixture(n_experts=2**31 - 1), "n_experts is 2147483647"),
        (mixture(n_experts=2**16, n_layers=2), r"n_layers \* n_experts is 131072"),
        (mixture(n_active_experts=0), "n_active_experts is 0"),
        (mixture(n_active_experts=5), "n_active_experts is 5, not between 1 and 4"),
        (mixture(moe_hidden_dim=0), "moe_hidden_dim is 0"),
        (mixture(moe_hidden_dim=48), "moe_hidden_dim is 48.*multiple of 32"),
        (mixture(rope_type=2), "lacks rope_scaling_factor"),
        (changed(weight_type=4), "unknown weight type 0x4"),
        (changed(activation=2), "unknown activation 0x2"),
        (changed(rope_type=3), "unknown rope type 0x3"),
        (without("dim"), "lacks dim"),
        (without("weight_type"), "lacks weight_type"),
        (changed(dim=0), "dim is 0|head_dim is 0"),
        (changed(dim=-64), "-64"),
        (changed(dim=48), "dim is 48.*multiple of 32"),
        (changed(dim=2**31 - 4), "between 1 and"),
        (changed(hidden_dim=100), "hidden_dim is 100.*multiple of 32"),
        (changed(n_layers=0), "n_layers is 0"),
        (changed(n_layers=2**31 - 1), "n_layers is 2147483647"),
        (changed(n_heads=0), "cannot be split over 0 heads"),
        (changed(n_heads=3), "cannot be split over 3 heads"),
        (changed(n_kv_heads=3), "4 heads cannot be shared by 3 kv heads"),
        (changed(n_kv_heads=0), "n_kv_heads is 0"),
        (changed(head_dim=0), "head_dim is 0"),
        (changed(head_dim=-2), "head_dim is -2"),
        (changed(head_dim=33), "must be even"),
        (changed(head_dim=10), r"n_heads \* head_dim is 40.*multiple of 32"),
        (changed(head_dim=2**20, n_heads=64), r"n_heads \* head_dim"),
        (changed(vocab_size=0), "vocab_size is 0"),
        (changed(vocab_size=2**31 - 1), "vocab_size is 2147483647"),
        (changed(seq_len=0), "seq_len is 0"),
        (changed(seq_len=-5), "seq_len is -5"),
        (changed(rope_theta=0), "rope_theta is 0"),
        (changed(norm_epsilon=7), "norm_epsilon is 7"),
        (changed(rope_type=2), "lacks rope_scaling_factor, .*orig_seq_len"),
        (changed(rope_type=0, rope_scaling_factor=8), "rope type LLAMA with a scaling factor of 8"),
        (changed(rope_scaling_factor=8), "lacks rope_scaling_low_freq_factor"),
        (changed(architecture=0xABCD01, rope_type=2), "lacks rope_scaling_factor"),
    ],
)
def test_refused_with_the_reason(data, reason):
    with pytest.raises(ValueError, match=reason):
        unpack_header(data)


@pytest.mark.parametrize(
    "shape, changes, reason",
    [
        (LLAMA3_1, {"rope_scaling_low_freq_factor": 4.0}, "the first must be above 0 and below the second"),
        (LLAMA3_1, {"rope_scaling_factor": 0.5}, "rope_scaling_factor is 0.5"),
        (LLAMA3_1, {"rope_scaling_orig_seq_len": 0}, "rope_scaling_orig_seq_len is 0"),
        (LLAMA, {"rope_scaling_factor": 2.0}, "belong to rope type LLAMA3_1"),
        (QWEN3, {"rope_type": RopeType.LLAMA}, "qwen3 turns half-split pairs"),
    ],
)
def test_shapes_that_cannot_exist(shape, changes, reason):
    with pytest.raises(ValueError, match=reason):
        config(shape, **changes)


@pytest.mark.parametrize(
    "changes, reason",
    [({"norm_epsilon": 1e-4}, "1e-05 and 1e-06 only"), ({"rope_theta": 10000.5}, "whole numbers only")],
)
def test_values_that_the_header_cannot_hold(changes, reason):
    with pytest.raises(ValueError, match=reason):
        pack_header(config(LLAMA, **changes))


@given(st.binary(max_size=MAX_HEADER_BYTES))
def test_any_bytes_behind_the_magic_give_a_value_error(tail):
    with pytest.raises(ValueError):
        unpack_header(struct.pack("<i", MAGIC) + tail)


@given(st.dictionaries(st.integers(-1, 23), st.integers(-(2**31), 2**31 - 1)))
def test_any_pairs_give_a_config_or_a_value_error(pairs):
    known = {KEYS.index(name): value for name, value in BASE.items()}
    try:
        model, _ = unpack_header(header({**known, **pairs}))
    except ValueError:
        return
    assert unpack_header(pack_header(model))[0] == model
