import enum
import sys

import numpy as np
import pytest

from converter.convert import Settings, convert, silent
from converter.gguf_file import TYPES
from converter.gguf_model import LLAMA3_FACTORS, SAME, open_file, rope_factors
from converter.hf_config import linear_scaling
from converter.to_gguf import to_gguf
from dllama.errors import FileError, FormatError
from dllama.formats import FloatType, ModelFile, RopeType
from tests.converter.gguf_files import KINDS, LLAMA, QWEN3, QWEN3_MOE, VOCAB, gguf_bytes, model, random_blocks
from tests.formats.models import config, write_random
from tests.tokenizer.models import as_t, train


def write(path, metadata=LLAMA, tensors=None, kinds="F32"):
    path.write_bytes(gguf_bytes(metadata, model(metadata, kinds) if tensors is None else tensors))
    return path


def by_name(checkpoint) -> dict:
    return {(info.name, info.layer): (info, source) for info, source in checkpoint.sources}


@pytest.mark.parametrize("metadata", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_the_shape(tmp_path, metadata):
    path = write(tmp_path / "a.gguf", metadata)
    checkpoint = open_file(path, FloatType.Q80, seq_len=40)
    c = checkpoint.config
    assert (c.dim, c.hidden_dim, c.n_layers, c.n_heads, c.n_kv_heads) == (64, 96, 2, 4, 2)
    assert (c.vocab_size, c.seq_len, c.norm_epsilon, c.weight_type) == (VOCAB, 40, 1e-5, FloatType.Q80)
    qwen3 = metadata is QWEN3
    assert (c.head_dim, c.rope_theta) == ((32, 1e6) if qwen3 else (16, 1e4))
    assert c.rope_type is (RopeType.HALF_SPLIT if qwen3 else RopeType.LLAMA)
    assert open_file(path, FloatType.Q80).config.seq_len == 77
    assert (checkpoint.kind, checkpoint.files) == ("GGUF file", [path])


@pytest.mark.parametrize("kind", ["F32", "Q4_0", "Q6_K"])
def test_an_expert_s_matrices_are_parts_of_a_tensor(tmp_path, kind):
    if kind == "Q6_K":
        gguf = pytest.importorskip("gguf")
    wide = QWEN3_MOE if kind != "Q6_K" else {
        **QWEN3_MOE, "qwen3moe.embedding_length": 256, "qwen3moe.expert_feed_forward_length": 256,
    }  # fmt: skip
    tensors = model(wide, {"_exps": kind})
    checkpoint = open_file(write(tmp_path / "a.gguf", wide, tensors), FloatType.Q40)
    c, sources = checkpoint.config, by_name(checkpoint)
    assert (c.n_experts, c.n_active_experts, c.hidden_dim) == (5, 2, 96)
    assert c.moe_hidden_dim == wide["qwen3moe.expert_feed_forward_length"]
    assert sources["router", 1][1].name == "blk.1.ffn_gate_inp.weight"
    for name, theirs in (("w1", "gate"), ("w2", "down"), ("w3", "up")):
        _, shape, raw = tensors[f"blk.1.ffn_{theirs}_exps.weight"]
        rows = np.frombuffer(raw, np.uint8).reshape(5, shape[1], -1)[3]
        info, source = sources[f"{name}.3", 1]
        assert source.shape == info.shape == shape[1:]
        if kind == "Q6_K":
            expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType.Q6_K)
            np.testing.assert_array_equal(source.rows(0, info.rows), expected)
        else:
            np.testing.assert_array_equal(source.stored(0, info.rows, SAME[kind]), rows)


def test_a_tied_output_matrix_is_the_embedding(tmp_path):
    tensors = model(LLAMA)
    sources = by_name(open_file(write(tmp_path / "a.gguf", LLAMA, tensors), FloatType.F32))
    assert sources["output", None][1].name == "token_embd.weight"
    tensors["output.weight"] = "F32", (VOCAB, 64), random_blocks(np.random.default_rng(1), "F32", (VOCAB, 64))
    sources = by_name(open_file(write(tmp_path / "a.gguf", LLAMA, tensors), FloatType.F32))
    assert sources["output", None][1].name == "output.weight"


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", "Q4_0", "Q8_0"])
def test_types_that_need_no_package(tmp_path, monkeypatch, kind):
    """Their values, against the gguf package's where it is; and the bytes of those that a .m file has as well."""
    gguf = None
    try:
        import gguf
    except ImportError:
        pass
    monkeypatch.setitem(sys.modules, "gguf", None)
    tensors = model(LLAMA, kind)
    sources = by_name(open_file(write(tmp_path / "a.gguf", LLAMA, tensors), FloatType.Q40))
    info, source = sources["q", 1]
    _, shape, raw = tensors["blk.1.attn_q.weight"]
    rows = np.frombuffer(raw, np.uint8).reshape(shape[0], -1)
    values = source.rows(3, 40)
    assert values.dtype == np.float32 and values.shape == (37, 64)
    if gguf:
        # The package's own way with F16 and F32 is a view.
        numbers = rows.view({"F32": "<f4", "F16": "<f2"}[kind]) if kind in ("F32", "F16") else rows
        expected = gguf.quants.dequantize(numbers, gguf.GGMLQuantizationType[kind])
        np.testing.assert_array_equal(values, expected[3:40].astype(np.float32))
    for float_type in FloatType:
        stored = source.stored(3, 40, float_type)
        if SAME.get(kind) is float_type:
            np.testing.assert_array_equal(stored, rows[3:40])
        else:
            assert stored is None


WIDE = {**LLAMA, "llama.embedding_length": 256, "llama.feed_forward_length": 512, "llama.block_count": 1}


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # some scales are NaN
@pytest.mark.parametrize("kind", [name for name, _, _ in TYPES.values() if name not in (*SAME, "BF16")])
def test_other_types_are_dequantised_by_the_package(tmp_path, kind):
    gguf = pytest.importorskip("gguf")
    tensors = model(WIDE, {"attn_q": kind, "ffn": "Q8_0"})
    info, source = by_name(open_file(write(tmp_path / "a.gguf", WIDE, tensors), FloatType.Q40))["q", 0]
    _, shape, raw = tensors["blk.0.attn_q.weight"]
    rows = np.frombuffer(raw, np.uint8).reshape(shape[0], -1)
    expected = gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(KINDS[kind]))
    np.testing.assert_array_equal(source.rows(0, 256), expected)
    assert source.stored(0, 256, FloatType.Q40) is None


def test_the_package_is_asked_for_where_it_is_needed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gguf", None)
    path = write(tmp_path / "a.gguf", WIDE, kinds={"attn_v": "Q6_K"})
    with pytest.raises(
        FormatError, match=r"a.gguf: Q6_K weights need the gguf package: pip install 'dllama\[convert\]'"
    ):
        open_file(path, FloatType.Q40)


def test_a_package_that_is_too_old_is_told_of(tmp_path, monkeypatch):
    gguf = pytest.importorskip("gguf")
    monkeypatch.setattr(gguf, "GGMLQuantizationType", enum.IntEnum("GGMLQuantizationType", {"Q4_0": 2}))
    with pytest.raises(FormatError, match="a.gguf: Q6_K weights need a newer gguf package"):
        open_file(write(tmp_path / "a.gguf", WIDE, kinds={"attn_v": "Q6_K"}), FloatType.Q40)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("scale", [0x7C00, 0x7C01, 0xFE00], ids=["infinity", "signalling NaN", "NaN"])
@pytest.mark.parametrize("kind", ["Q4_0", "Q8_0", "Q4_K", "Q6_K"])
def test_scales_that_are_not_finite_are_one_error_and_no_warning(tmp_path, kind, scale):
    if kind not in SAME:
        pytest.importorskip("gguf")
    tensors = model(WIDE, {"attn_q": kind})
    _, shape, raw = tensors["blk.0.attn_q.weight"]
    place = 208 if kind == "Q6_K" else 0
    tensors["blk.0.attn_q.weight"] = kind, shape, raw[:place] + scale.to_bytes(2, "little") + raw[place + 2 :]
    path = write(tmp_path / "a.gguf", WIDE, tensors)
    for weight_type in (FloatType.Q40, FloatType.Q80, FloatType.F32):
        with pytest.raises(FormatError, match="attn_q.weight has values that are not finite"):
            convert(path, tmp_path / "a.m", Settings(weight_type))
        result = convert(path, tmp_path / "a.m", Settings(weight_type, allow_non_finite=True))
        assert set(result.zeroed) == {"blk.0.attn_q.weight"}


@pytest.mark.parametrize("recipe", ["Q4_K_M", "Q5_K_M", "Q6_K", "Q2_K", "Q4_0"])
def test_files_that_llama_cpp_quantised(tmp_path, recipe):
    """Several types in one file; the values are near those of the file it was made from."""
    llama_cpp = pytest.importorskip("llama_cpp")
    pytest.importorskip("gguf")
    tokenizer = as_t(train(tmp_path / "tokenizer.model", vocab_size=400))
    shape = config(weight_type=FloatType.F32, dim=256, hidden_dim=512, head_dim=64, vocab_size=400)
    write_random(tmp_path / "a.m", shape)
    to_gguf(tmp_path / "a.m", tokenizer, tmp_path / "a.gguf", silent)
    settings = llama_cpp.llama_model_quantize_default_params()
    settings.ftype, settings.nthread = getattr(llama_cpp, f"LLAMA_FTYPE_MOSTLY_{recipe}"), 1
    out = tmp_path / "b.gguf"
    assert llama_cpp.llama_model_quantize(str(tmp_path / "a.gguf").encode(), str(out).encode(), settings) == 0
    checkpoint = open_file(out, FloatType.Q40)
    assert len({source.dtype for _, source in checkpoint.sources}) > 1
    with ModelFile(tmp_path / "a.m") as file:
        for info, source in checkpoint.sources:
            exact, values = file.f32(info.name, info.layer).reshape(info.rows, -1), source.rows(0, info.rows)
            error = np.square(values - exact).mean() / np.square(exact).mean()
            assert error < (0.2 if recipe == "Q2_K" else 0.02), info.label
    convert(out, tmp_path / "b.m", Settings(FloatType.Q40))
    with ModelFile(tmp_path / "b.m") as file:
        copied = [(info, source) for info, source in checkpoint.sources if SAME.get(source.dtype) is info.float_type]
        assert len(copied) > (2 * 7 if recipe == "Q4_0" else 2 * 2)  # every matrix of the layers, or the norms alone
        for info, source in copied:
            stored = source.stored(0, info.rows, info.float_type)
            np.testing.assert_array_equal(file.raw(info.name, info.layer), stored)


@pytest.mark.parametrize("original", [8192, 32])
@pytest.mark.parametrize("head_dim, theta", [(64, 500000.0), (128, 500000.0), (16, 10000.0)])
def test_llama_3_1_s_scaling_is_found_again(tmp_path, original, head_dim, theta):
    metadata = {**LLAMA, "llama.attention.key_length": head_dim, "llama.attention.value_length": head_dim,
                "llama.rope.freq_base": theta}  # fmt: skip
    factors = rope_factors(theta, head_dim, 8.0, *LLAMA3_FACTORS, original).astype("<f4")
    tensors = model(metadata) | {"rope_freqs.weight": ("F32", (head_dim // 2,), factors.tobytes())}
    c = open_file(write(tmp_path / "a.gguf", metadata, tensors), FloatType.F32).config
    assert (c.rope_type, c.rope_scaling_factor) == (RopeType.LLAMA3_1, 8.0)
    found = rope_factors(theta, head_dim, 8.0, c.rope_scaling_low_freq_factor, c.rope_scaling_high_freq_factor,
                         c.rope_scaling_orig_seq_len)  # fmt: skip
    np.testing.assert_allclose(found, factors, rtol=1e-5)


@pytest.mark.parametrize(
    "said",
    [
        {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
        {"llama.rope.scaling.type": "linear", "llama.rope.scale_linear": 4.0},
        {"llama.rope.scaling.factor": 4.0},
        {"llama.rope.scale_linear": 4.0},
    ],
)
def test_linear_scaling(tmp_path, said):
    """As llama.cpp reads it: under two names, and what is scaled without a type is scaled linearly."""
    metadata = {**LLAMA, **said}
    expected = config(rope_type=RopeType.LLAMA3_1, **linear_scaling(4.0))
    in_metadata = open_file(write(tmp_path / "a.gguf", metadata), FloatType.F32).config
    tensors = model(LLAMA) | factors([4.0] * 8)
    in_factors = open_file(write(tmp_path / "b.gguf", LLAMA, tensors), FloatType.F32).config
    for found in (in_metadata, in_factors):
        assert (found.rope_type, found.rope_scaling_factor) == (expected.rope_type, 4.0)
        assert found.rope_scaling_orig_seq_len == expected.rope_scaling_orig_seq_len


@pytest.mark.parametrize(
    "said",
    [
        {"scaling.factor": 1.0}, {"scale_linear": 0.0}, {"scaling.type": "linear"},
        {"scaling.type": "linear", "scaling.factor": 0.0}, {"scaling.type": "none", "scaling.factor": 4.0},
    ],
)  # fmt: skip
@pytest.mark.parametrize("metadata", [LLAMA, QWEN3], ids=["llama", "qwen3"])
def test_metadata_that_scale_nothing(tmp_path, metadata, said):
    arch = metadata["general.architecture"]
    path = write(tmp_path / "a.gguf", {**metadata, **{f"{arch}.rope.{key}": value for key, value in said.items()}})
    assert (
        open_file(path, FloatType.F32).config == open_file(write(tmp_path / "b.gguf", metadata), FloatType.F32).config
    )


def test_factors_of_one_are_no_scaling(tmp_path):
    tensors = model(LLAMA) | {"rope_freqs.weight": ("F32", (8,), np.ones(8, "<f4").tobytes())}
    assert open_file(write(tmp_path / "a.gguf", LLAMA, tensors), FloatType.F32).config.rope_type is RopeType.LLAMA


def bias() -> dict:
    return model(LLAMA) | {"blk.0.attn_q.bias": ("F32", (64,), bytes(256))}


def factors(values) -> dict:
    return model(LLAMA) | {"rope_freqs.weight": ("F32", (len(values),), np.array(values, "<f4").tobytes())}


def without(name: str) -> dict:
    return {key: tensor for key, tensor in model(LLAMA).items() if key != name}


@pytest.mark.parametrize(
    "metadata, tensors, reason",
    [
        ({"general.architecture": "gpt2"}, None, r"gpt2 cannot be converted \(known: llama, qwen3, qwen3moe\)"),
        ({"general.architecture": 5}, None, "general.architecture is not text"),
        ({"general.architecture": ["llama"]}, None, "general.architecture is not text"),
        ({"general.architecture": np.zeros(2, "<i4")}, None, "general.architecture is not text"),
        ({"split.count": np.zeros(2, "<i4")}, None, "one of several parts"),
        ({"llama.expert_count": 8}, None, "mixture of experts"),
        ({**QWEN3_MOE, "qwen3moe.expert_count": 0}, None, "n_experts is 0"),
        ({**QWEN3_MOE, "qwen3moe.expert_used_count": 9}, None, "n_active_experts is 9"),
        (
            {**QWEN3_MOE, "qwen3moe.expert_count": 6},
            model(QWEN3_MOE),
            r"ffn_gate_inp.weight is \[5, 64\], the metadata call for \[6",
        ),
        (
            {**QWEN3_MOE, "qwen3moe.expert_feed_forward_length": 32},
            model(QWEN3_MOE),
            r"ffn_gate_exps.weight is \[5, 64, 64\], the metadata call for \[5, 32, 64\]",
        ),
        ({"split.count": 3}, None, "one of several parts"),
        ({"llama.context_length": "x"}, None, "llama.context_length is not one whole number"),
        ({"llama.attention.head_count": 0}, None, "head_count is 0"),
        ({"llama.attention.head_count": np.array([4, 2], "<i4")}, None, "head_count is not one whole number"),
        ({"llama.attention.value_length": 8}, None, "of another size than their keys"),
        ({"llama.rope.dimension_count": 8}, None, "of another size than their keys"),
        ({"llama.attention.layer_norm_rms_epsilon": 1e-3}, None, "epsilon is 0.00"),
        ({"llama.rope.freq_base": "x"}, None, "freq_base is 'x', not a number"),
        ({"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 1.5}, None, "linear rope scaling by 1.5"),
        ({"llama.rope.freq_base": float("inf")}, factors([8.0] * 4 + [2.0] * 4), "freq_base is inf, not between 1"),
        ({"llama.rope.freq_base": -1.0}, factors([8.0] * 4 + [2.0] * 4), "freq_base is -1.0, not between 1"),
        ({"llama.rope.scaling.type": "yarn"}, None, "rope scaling yarn is not supported"),
        ({"llama.rope.scaling.type": np.zeros(2, "<i4")}, None, "llama.rope.scaling.type is not text"),
        ({"llama.rope.scaling.factor": np.zeros(2, "<f4")}, None, "llama.rope.scaling.factor is .* not a number"),
        ({**QWEN3, "qwen3.rope.scaling.factor": 4.0}, model(QWEN3), "rope scaling linear is not supported"),
        ({"llama.block_count": 1 << 30}, None, "n_layers is 1073741824"),
        ({}, without("token_embd.weight"), "tensor token_embd.weight is missing"),
        ({}, without("blk.1.ffn_up.weight"), "tensor blk.1.ffn_up.weight is missing"),
        (
            {"llama.feed_forward_length": 128},
            model(LLAMA),
            r"ffn_gate.weight is \[96, 64\], the metadata call for \[128",
        ),
        ({}, bias(), "attn_q.bias has no place in this architecture, and a .m file has no place for biases"),
        ({}, factors([1.0] * 7), r"rope_freqs.weight is \[7\], not \[8\]"),
        ({}, factors([1.0] * 7 + [0.5]), "factors that are not Llama 3.1's"),
        ({}, factors([8.0] * 4 + [1.0] * 4), "factors that are not Llama 3.1's"),
    ],
)
def test_refused_with_the_reason(tmp_path, metadata, tensors, reason):
    path = write(tmp_path / "a.gguf", {**LLAMA, **metadata}, model(LLAMA) if tensors is None else tensors)
    with pytest.raises(FormatError, match=f"a.gguf: .*{reason}"):
        open_file(path, FloatType.F32)


def test_a_context_longer_than_the_model_s(tmp_path):
    with pytest.raises(FileError, match="a context of 78 is longer than the model's own, 77"):
        open_file(write(tmp_path / "a.gguf"), FloatType.F32, seq_len=78)


@pytest.mark.parametrize("kind", SAME)
def test_copied_values_must_be_finite(tmp_path, kind):
    tensors = model(LLAMA, kind)
    name = "blk.0.attn_q.weight"
    bad = np.array(np.nan, "<f4" if kind == "F32" else "<f2").tobytes()
    tensors[name] = (kind, tensors[name][1], bad + tensors[name][2][len(bad) :])
    sources = by_name(open_file(write(tmp_path / "a.gguf", LLAMA, tensors), SAME[kind]))
    with pytest.raises(ValueError, match="values that are not finite"):
        sources["q", 0][1].stored(0, 64, SAME[kind])
