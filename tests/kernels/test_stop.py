"""What travels at a stop: the picked targets' values as bytes and back, and nothing written outside them."""

import numpy as np
import pytest

from dllama.kernels import tags
from dllama.kernels.stop import pack, unpack
from tests.kernels.calls import room
from tests.kernels.test_answer import FORMS, RNG, arrived, travelling

CASES = [((0,), 1, 5), ((0, 1, 2), 3, 128), ((0, 2), 3, 33), ((1,), 2, 1), ((1, 2), 3, 16)]
NUMBERS = [np.nan, np.inf, -np.inf]


def packed(form, values, picked, rank) -> tuple[bool, np.ndarray]:
    """What `pack` returns, and the bytes that it has written."""
    row_bytes = travelling(form, np.zeros((1, len(picked) * rank), np.float32)).shape[1]
    with room(len(values) * row_bytes) as out:
        found = pack(form, values, np.array(picked), rank, one_row(picked, rank), out)
    return found, out.reshape(len(values), row_bytes)


def unpacked(form, raw, values, picked, rank) -> bool:
    return unpack(form, raw.ctypes.data, values, np.array(picked), rank, one_row(picked, rank))


def one_row(picked, rank) -> np.ndarray:
    return np.full(-(-len(picked) * rank // 32) * 32, 9, np.float32)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("picked, count, rank", CASES)
@pytest.mark.parametrize("rows", [1, 4])
def test_some_targets_of_a_larger_array(form, picked, count, rank, rows):
    values = RNG.standard_normal((rows, count + 1, rank + 3), np.float32)
    chosen = np.ascontiguousarray(values[:, picked, :rank]).reshape(rows, -1)
    found, raw = packed(form, values, picked, rank)
    assert found and raw.tobytes() == travelling(form, chosen).tobytes()

    back = np.full((rows, count + 1, rank + 3), 7, np.float32)
    assert unpacked(form, raw, back, picked, rank)
    expected = np.full_like(back, 7)
    expected[:, picked, :rank] = arrived(form, raw, len(picked) * rank).reshape(rows, len(picked), rank)
    np.testing.assert_allclose(back, expected, rtol=1e-6)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("value", NUMBERS)
def test_numbers_that_are_none_do_not_leave_where_they_are_picked(form, value):
    values = np.ones((2, 3, 40), np.float32)
    values[1, 1] = value
    assert packed(form, values, (0, 2), 40)[0]
    assert not packed(form, values, (0, 1), 40)[0]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.name)
@pytest.mark.parametrize("value", NUMBERS)
def test_numbers_that_are_none_do_not_come_in(form, value):
    raw = travelling(form, np.ones((2, 80), np.float32))
    kind, width = (np.float32, 4) if form is tags.F32 else (np.float16, 2)
    at = 64 // 32 * 34 if form is tags.Q80 else 64 * width  # the scale of the third block, or a value of it
    raw[1, at : at + width] = np.array([value], kind).view(np.uint8)
    assert not unpacked(form, raw, np.zeros((2, 2, 40), np.float32), (0, 1), 40)
