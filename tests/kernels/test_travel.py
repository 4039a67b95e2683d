"""Rows of floats as bytes that travel, and their sums back."""

import numpy as np
import pytest

from dllama.formats.blocks import FloatType, dequantize, quantize
from dllama.kernels import tags
from dllama.kernels.travel import decode_sum, encode

RNG = np.random.default_rng(3)


def rows_of(columns, rows=3):
    """Rows padded with zeros to a multiple of 32."""
    x = np.zeros((rows, -(-columns // 32) * 32), np.float32)
    x[:, :columns] = RNG.standard_normal((rows, columns)) * 10.0 ** RNG.integers(-3, 4, (rows, columns))
    return x


def encoded(form, x, columns) -> np.ndarray:
    out = np.full((len(x), FloatType[form.name.upper()].row_bytes(columns if form is tags.F32 else x.shape[1])), 0xAA)
    out = out.astype(np.uint8)
    encode(form, x.ctypes.data, x.strides[0], len(x), columns, out.ctypes.data)
    return out


@pytest.mark.parametrize("columns", [32, 96, 60, 20])
def test_q80_is_the_formats_own(columns):
    x = rows_of(columns)
    found, expected = encoded(tags.Q80, x, columns), quantize(x, FloatType.Q80)
    back = [dequantize(raw, FloatType.Q80, x.shape[1]) for raw in (found, expected)]
    assert abs(back[0] - back[1]).max() <= abs(x).max() / 127 * 1.001  # values between two steps may go either way
    assert (found == expected).mean() > 0.97


@pytest.mark.parametrize("columns", [32, 96, 60, 20])
def test_f32_is_the_bytes_themselves(columns):
    x = rows_of(columns)
    assert np.array_equal(encoded(tags.F32, x, columns).view(np.float32), x[:, :columns])


@pytest.mark.parametrize("columns", [32, 96, 60, 20])
def test_f16_is_numpys_filled_up_with_zeros(columns):
    x = rows_of(columns)
    assert np.array_equal(encoded(tags.F16, x, columns).view(np.float16), x.astype(np.float16))


@pytest.mark.parametrize("form", [tags.F32, tags.F16, tags.Q80], ids=lambda form: form.name)
@pytest.mark.parametrize("columns", [32, 96, 60])
@pytest.mark.parametrize("nodes", [1, 2, 5])
def test_sums_are_of_all_parts_in_their_order(form, columns, nodes):
    parts = [encoded(form, rows_of(columns), columns) for _ in range(nodes)]
    expected = np.zeros((3, columns), np.float32)
    for raw in parts:
        kind = FloatType[form.name.upper()]
        whole = raw.view(np.float32) if form is tags.F32 else dequantize(raw, kind, -(-columns // 32) * 32)
        expected += whole[:, :columns]
    out = np.full((3, -(-columns // 32) * 32), np.nan, np.float32)
    sources = np.array([raw.ctypes.data for raw in parts])
    decode_sum(form, sources, out.ctypes.data, out.strides[0], 3, columns)
    assert np.array_equal(out[:, :columns], expected)
