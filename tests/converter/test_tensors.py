import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.tensors import HalfSplit, Joined, Tensor, interleave_pairs, to_float32
from dllama.errors import FileError
from dllama.formats import FloatType, quantize
from tests.converter.checkpoints import encoded


def test_special_values_of_bfloat16():
    values = np.array([np.inf, -np.inf, -0.0, 2.0**-133, 3.3895314e38], dtype=np.float32)
    _, _, data = encoded(values, "BF16")
    np.testing.assert_array_equal(to_float32(data, "BF16"), values)
    assert np.isnan(to_float32(b"\xc0\x7f", "BF16")[0])


@pytest.mark.parametrize("finite", [True, False])
def test_every_number_of_float16(finite):
    numbers = np.arange(1 << 16, dtype="<u2").view("<f2")
    numbers = numbers[np.isfinite(numbers)] if finite else numbers
    with np.errstate(invalid="ignore"):  # signalling NaN
        expected = numbers.astype(np.float32)
    found = to_float32(numbers.tobytes(), "F16")
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(np.signbit(found), np.signbit(expected))


def test_long_runs_are_converted_in_steps(monkeypatch):
    monkeypatch.setattr("converter.tensors.STEP", 7)
    values = np.arange(-20, 20, dtype=np.float32)
    for dtype in ("F16", "BF16", "F32"):
        np.testing.assert_array_equal(to_float32(encoded(values, dtype)[2], dtype), values)


@given(st.integers(0, 7), st.integers(1, 8), st.sampled_from([0, 1]), st.integers(1, 4))
def test_parts_make_the_whole(tmp_path_factory, start, height, axis, parts):
    folder = tmp_path_factory.mktemp("parts")
    whole = np.arange(8 * 12 * parts, dtype=np.float32).reshape(8 * parts, 12)
    if axis == 1:
        whole = whole.reshape(8, 12 * parts)
    tensors = []
    for rank, part in enumerate(np.split(whole, parts, axis=axis)):
        path = folder / str(rank)
        path.write_bytes(b"head" + part.tobytes())
        tensors.append(Tensor("a", path, "F32", part.shape, 4))
    joined = Joined(tuple(tensors), axis)
    stop = min(start + height, len(whole))
    assert joined.shape == whole.shape
    np.testing.assert_array_equal(joined.rows(start, stop), whole[start:stop])
    np.testing.assert_array_equal(joined.stored(start, stop, FloatType.F32).view(np.float32), whole[start:stop])
    assert joined.stored(start, stop, FloatType.F16) is None


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_bytes_that_are_those_of_the_model_file(tmp_path, dtype):
    values = np.random.default_rng(0).standard_normal((8, 6), dtype=np.float32)
    (tmp_path / "a").write_bytes(encoded(values, dtype)[2])
    tensor = Tensor("a", tmp_path / "a", dtype, (8, 6), 0)
    heads = HalfSplit(**vars(tensor), head_dim=4)
    for source in (tensor, heads):
        rows = source.rows(4, 8)
        np.testing.assert_array_equal(source.stored(4, 8, FloatType[dtype]), quantize(rows, FloatType[dtype]))
        assert not any(source.stored(4, 8, other) is not None for other in FloatType if other.name != dtype)


@pytest.mark.parametrize("dtype", ["F32", "F16"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_bytes_that_are_not_finite_are_refused(tmp_path, monkeypatch, dtype, value):
    monkeypatch.setattr("converter.tensors.STEP", 7)
    values = np.full((8, 6), 65504, np.float32)
    (tmp_path / "a").write_bytes(encoded(values, dtype)[2])
    tensor = Tensor("a", tmp_path / "a", dtype, (8, 6), 0)
    assert tensor.stored(0, 8, FloatType[dtype]) is not None
    values[6, 2] = value
    (tmp_path / "a").write_bytes(encoded(values, dtype)[2])
    assert tensor.stored(0, 6, FloatType[dtype]) is not None
    with pytest.raises(ValueError, match="values that are not finite"):
        tensor.stored(6, 8, FloatType[dtype])


def test_interleaved_pairs():
    rows = np.arange(8)[:, None]  # two heads of four: rows i and i + 2 of a head are a pair
    assert interleave_pairs(rows, 4).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]


def test_a_file_that_shrinks_meanwhile(tmp_path):
    (tmp_path / "a").write_bytes(bytes(20))
    with pytest.raises(FileError, match="a: became shorter while it was read"):
        Tensor("a", tmp_path / "a", "F32", (3, 2), 0).rows(1, 3)
