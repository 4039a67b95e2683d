"""Rows of values as bytes and back."""

import numpy as np
import pytest

from dllama.formats import FloatType
from dllama.privatelora.travel import Rows, Targets

FORMS = [FloatType.F32, FloatType.F16, FloatType.Q80]
BOUNDS = {FloatType.F32: 0, FloatType.F16: 2**-11, FloatType.Q80: 1 / 254}
"""Of the largest value."""


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("width", [1, 31, 32, 60, 384])
def test_there_and_back(form, width):
    x = np.random.default_rng(0).standard_normal((5, width), np.float32)
    rows = Rows(form, width)
    payload = rows.encode(x)
    assert payload.dtype == np.uint8 and len(payload) == 5 * rows.row_bytes
    back = rows.decode(payload.tobytes(), 5)
    assert abs(back - x).max() <= 1.01 * BOUNDS[form] * abs(x).max()
    assert form is FloatType.F32 or (back != x).any()


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_larger_array(form):
    x = np.random.default_rng(1).standard_normal((6, 200), np.float32)
    rows = Rows(form, 40)
    np.testing.assert_array_equal(rows.encode(x[::2, 50:90]), rows.encode(x[::2, 50:90].copy()))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("change", [-1, 1, -40])
def test_another_number_of_bytes(form, change):
    rows = Rows(form, 40)
    count = 3 * rows.row_bytes + change
    with pytest.raises(ValueError, match=f"{count} bytes for 3 rows of {rows.row_bytes} bytes"):
        rows.decode(bytes(count), 3)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(value):
    said = "infinite or no number"
    x = np.ones((2, 64), np.float32)
    x[1, 39] = value
    with pytest.raises(ValueError, match=said):
        Rows(FloatType.F32, 64).decode(x.tobytes(), 2)
    with pytest.raises(ValueError, match=said):
        Rows(FloatType.F16, 64).decode(x.astype(np.float16).tobytes(), 2)
    blocks = Rows(FloatType.Q80, 64).encode(np.ones((2, 64), np.float32))
    blocks[34 * 3 :][:2] = np.array([value], np.float16).view(np.uint8)  # the scale of the last block
    with pytest.raises(ValueError, match=said):
        Rows(FloatType.Q80, 64).decode(blocks, 2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_no_number_does_not_leave(form, value):
    x = np.ones((2, 64), np.float32)
    x[1, 39] = value
    with pytest.raises(ValueError, match="infinite or no number"):
        Rows(form, 64).encode(x)


def test_what_is_too_large_for_half_precision_becomes_its_largest():
    rows = Rows(FloatType.F16, 3)
    x = np.array([[1e6, -1e30, 3.0]], np.float32)
    assert rows.decode(rows.encode(x), 1).tolist() == [[65504.0, -65504.0, 3.0]]


@pytest.mark.parametrize("form", FORMS)
def test_targets_there_and_back(form):
    values = np.random.default_rng(2).standard_normal((5, 3, 140), np.float32)
    targets = Targets(form, [0, 2], 3, 128)
    payload = targets.encode(values[:, :, :133])
    together = values[:, [0, 2], :128].reshape(5, -1)
    assert payload.tobytes() == Rows(form, 256).encode(together).tobytes()
    back = targets.decode(payload.tobytes(), 5)
    assert back.shape == (5, 3, 128) and not back[:, 1].any()
    np.testing.assert_array_equal(back[:, [0, 2]].reshape(5, -1), Rows(form, 256).decode(payload, 5))


@pytest.mark.parametrize("form", FORMS)
def test_targets_of_another_number_of_bytes_and_numbers_that_are_none(form):
    targets = Targets(form, [1], 3, 40)
    payload = targets.encode(np.ones((3, 3, 40), np.float32)).tobytes()
    for wrong in (payload[:-1], payload + b"x", b""):
        with pytest.raises(ValueError, match=f"{len(wrong)} bytes for 3 rows"):
            targets.decode(wrong, 3)
    with pytest.raises(ValueError, match="infinite or no number"):
        targets.encode(np.full((1, 3, 40), np.nan, np.float32))
    if form is not FloatType.Q80:
        with pytest.raises(ValueError, match="infinite or no number"):
            targets.decode(b"\xff" * len(payload), 3)
