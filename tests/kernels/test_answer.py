"""The edge's kernel: from the bytes of A·x to those of M·A·x, and nothing written outside them."""

import numpy as np
import pytest

from dllama.formats.blocks import FloatType, dequantize, quantize
from dllama.kernels import tags
from dllama.kernels.answer import answer
from tests.kernels.calls import float_type, pad, room

RNG = np.random.default_rng(11)
FORMS = [tags.F32, tags.F16, tags.Q80]
BOUNDS = {tags.F32: 1e-6, tags.F16: 2e-3, tags.Q80: 1e-2}


def travelling(form, x) -> np.ndarray:
    """Rows as they travel, uint8 [rows, row_bytes]."""
    if form is tags.Q80:
        return quantize(pad(x), float_type(form))
    values = x if form is tags.F32 else pad(x).astype(np.float16)
    return values.view(np.uint8).reshape(len(x), -1)


def arrived(form, raw, width) -> np.ndarray:
    if form is tags.F32:
        return raw.view(np.float32)
    return dequantize(raw, float_type(form), -(-width // 32) * 32)[:, :width]


def answered(form, sent, rows, m) -> tuple[bool, np.ndarray]:
    """What `answer` returns, and the bytes that it has written."""
    targets, r_out, r_in = m.shape
    widths = targets * r_in, targets * r_out
    x_stride, y_stride = (4 * (-(-width // 32) * 32) for width in widths)
    row_bytes = float_type(form).row_bytes(widths[1] if form is tags.F32 else y_stride // 4)
    beyond = np.concatenate([m.ravel(), np.full(16, np.nan, np.float32)])  # read, but of no account
    with room(rows * x_stride + 64) as x, room(rows * y_stride + 64) as y, room(rows * row_bytes) as out:
        found = answer(
            form, np.array([sent.ctypes.data]), rows, targets, r_in, r_out, beyond.ctypes.data,
            x.ctypes.data, x_stride, y.ctypes.data, y_stride, out.ctypes.data,
        )  # fmt: skip
    return found, out.reshape(rows, row_bytes)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("r_in, r_out", [(32, 32), (8, 4), (33, 5), (5, 33), (1, 1), (17, 48), (128, 16)])
@pytest.mark.parametrize("targets, rows", [(1, 1), (2, 5), (3, 3)])
def test_every_rank(form, r_in, r_out, targets, rows):
    m = RNG.standard_normal((targets, r_out, r_in), np.float32)
    sent = travelling(form, RNG.standard_normal((rows, targets * r_in), np.float32))
    found, raw = answered(form, sent, rows, m)
    x = arrived(form, sent, targets * r_in).reshape(rows, targets, r_in).astype(np.float64)
    expected = np.einsum("tji,nti->ntj", m, x).reshape(rows, -1)
    assert found
    assert abs(arrived(form, raw, targets * r_out) - expected).max() <= BOUNDS[form] * abs(expected).max()


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("place", [(0, 0), (1, 30), (2, 19)])
def test_a_number_that_is_none_gets_no_answer(form, value, place):
    m = RNG.standard_normal((2, 7, 20), np.float32)
    x = RNG.standard_normal((3, 40), np.float32)
    if form is tags.Q80:
        sent = travelling(form, x)
        sent[place[0], 34 * (place[1] // 32) :][:2] = np.array([value], np.float16).view(np.uint8)  # a block's scale
    else:
        x[place] = value
        sent = travelling(form, x)
    found, raw = answered(form, sent, 3, m)
    assert not found and not raw.any()


def test_forms_have_the_bytes_of_the_file_format():
    assert FloatType.F16.row_bytes(64) == 128 and FloatType.Q80.row_bytes(64) == 68
