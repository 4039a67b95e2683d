import numpy as np
import pytest

from dllama.errors import FileError, FormatError
from dllama.formats import FloatType
from dllama.formats.tensor import Tensor, to_float32
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
    monkeypatch.setattr("dllama.formats.tensor.STEP", 7)
    values = np.arange(-20, 20, dtype=np.float32)
    for dtype in ("F16", "BF16", "F32"):
        np.testing.assert_array_equal(to_float32(encoded(values, dtype)[2], dtype), values)


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_all_values_at_once(tmp_path, dtype):
    values = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(b"head" + encoded(values, dtype)[2])
    np.testing.assert_array_equal(Tensor("a", tmp_path / "a", dtype, (2, 3, 4), 4).values(), values)


@pytest.mark.parametrize("dtype", ["F32", "F16"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf])
def test_bytes_that_are_not_finite_are_refused(tmp_path, monkeypatch, dtype, value):
    monkeypatch.setattr("dllama.formats.tensor.STEP", 7)
    values = np.full((8, 6), 65504, np.float32)
    (tmp_path / "a").write_bytes(encoded(values, dtype)[2])
    tensor = Tensor("a", tmp_path / "a", dtype, (8, 6), 0)
    assert tensor.stored(0, 8, FloatType[dtype]) is not None
    values[6, 2] = value
    (tmp_path / "a").write_bytes(encoded(values, dtype)[2])
    assert tensor.stored(0, 6, FloatType[dtype]) is not None
    with pytest.raises(ValueError, match="values that are not finite"):
        tensor.stored(6, 8, FloatType[dtype])


@pytest.mark.parametrize(
    "dtype, data, said",
    [
        ("I32", bytes(8), "I32, which is not read"),
        ("F32", bytes(4) + b"\0\0\x80\x7f", "values that are not finite"),
        ("BF16", b"\xc0\x7f" * 2, "values that are not finite"),
    ],
)
def test_values_that_are_no_numbers_are_refused_by_name(tmp_path, dtype, data, said):
    (tmp_path / "a").write_bytes(data)
    with pytest.raises(FormatError, match=f"a: tensor x .*{said}"):
        Tensor("x", tmp_path / "a", dtype, (2,), 0).values()


def test_a_file_that_shrinks_meanwhile(tmp_path):
    (tmp_path / "a").write_bytes(bytes(20))
    with pytest.raises(FileError, match="a: became shorter while it was read"):
        Tensor("a", tmp_path / "a", "F32", (3, 2), 0).rows(1, 3)
