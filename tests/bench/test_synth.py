"""Synthetic models: the right shape and scale, the same bytes for both programs, the same bytes every time."""

import numpy as np
import pytest

from bench.synth import GGUF_NAMES, SHAPES, SPECIAL, tensors, write
from dllama.errors import FileError
from dllama.formats import FloatType, ModelFile, dequantize
from dllama.tokenizer import load_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("synth")
    write("tiny", folder / "tiny.m", tokenizer=folder / "tiny.t")
    return folder


def test_model_opens_with_the_shape_asked_for(folder):
    with ModelFile(folder / "tiny.m") as model:
        assert model.config == SHAPES["tiny"]
        for info, data in tensors(SHAPES["tiny"]):
            np.testing.assert_array_equal(model.raw(info.name, info.layer), data.view(np.uint8))


def test_seed_decides_the_bytes(tmp_path, folder):
    write("tiny", tmp_path / "same.m")
    write("tiny", tmp_path / "other.m", seed=1)
    assert (tmp_path / "same.m").read_bytes() == (folder / "tiny.m").read_bytes()
    assert (tmp_path / "other.m").read_bytes() != (folder / "tiny.m").read_bytes()


def test_matrices_keep_activations_of_order_one():
    config = SHAPES["small"]
    for info, data in tensors(config):
        if info.layer not in (0, None) or info.float_type is not FloatType.Q40:
            continue
        values = dequantize(data, FloatType.Q40, info.columns)
        gain = values.std() * np.sqrt(info.columns)
        assert gain == pytest.approx(1 / np.sqrt(2 * config.n_layers) if info.name in ("o", "w2") else 1, rel=0.03)
        assert abs(values.mean()) < 0.02 * values.std()


def test_special_tokens_are_never_the_best(folder):
    with ModelFile(folder / "tiny.m") as model:
        output = model.f32("output")
    assert not output[: len(SPECIAL)].any()
    assert output[len(SPECIAL) :].any(axis=1).all()


def test_tokenizer_fits_the_model(folder):
    tokenizer = load_tokenizer(folder / "tiny.t")
    assert tokenizer.vocab_size == SHAPES["tiny"].vocab_size
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (1, (2,))
    assert tokenizer.decode(tokenizer.encode("Zwölf Boxkämpfer")) == "Zwölf Boxkämpfer"


def test_gguf_holds_the_same_blocks(tmp_path, folder):
    gguf = pytest.importorskip("gguf", reason="the bench extra is not installed")
    write("tiny", tmp_path / "tiny.m", tmp_path / "tiny.gguf")
    reader = gguf.GGUFReader(tmp_path / "tiny.gguf")
    found = {tensor.name: tensor for tensor in reader.tensors}
    with ModelFile(tmp_path / "tiny.m") as model:
        assert len(found) == len(list(model.tensors()))
        for info in model.tensors():
            name = GGUF_NAMES[info.name] + ".weight"
            tensor = found[name if info.layer is None else f"blk.{info.layer}.{name}"]
            assert tensor.tensor_type.name == ("F32" if info.float_type is FloatType.F32 else "Q4_0")
            assert tuple(tensor.shape) == info.shape[::-1]  # GGUF names the fastest dimension first
            assert tensor.data.tobytes() == model.raw(info.name, info.layer).tobytes()
    assert reader.fields["llama.attention.head_count_kv"].contents() == SHAPES["tiny"].n_kv_heads


def test_nothing_is_left_where_writing_fails(tmp_path):
    pytest.importorskip("gguf", reason="the bench extra is not installed")
    with pytest.raises(FileError, match="missing"):
        write("tiny", tmp_path / "missing" / "tiny.m", tmp_path / "tiny.gguf")
    assert list(tmp_path.iterdir()) == []
