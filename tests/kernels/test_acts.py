"""Activations as the products take them: Q80 as the file format rounds, or floats."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from dllama.formats import FloatType, quantize
from dllama.kernels import tags
from tests.kernels.calls import act_blocks, to_acts

formats = pytest.mark.parametrize("weight", [tags.F32, tags.F16, tags.Q40, tags.Q80], ids=lambda tag: tag.name)
normal_floats = st.floats(-1e6, 1e6, width=32).filter(lambda x: x == 0 or abs(x) > 1e-30)


def assert_rounds_like_the_format(x, ints, scales):
    """x float32 [rows, n]; ints, scales of its blocks. Where a value lies within float32's rounding of the middle of
    two integers, either will do."""
    blocks = x.reshape(len(x), -1, 32)
    expected = quantize(x, FloatType.Q80).reshape(len(x), -1, 34)[..., 2:].view(np.int8).astype(int)
    np.testing.assert_allclose(scales, abs(blocks).max(-1) / np.float32(127), rtol=1.2e-7)
    unsure = ints != expected
    assert (abs(ints - expected)[unsure] == 1).all()
    exact = blocks.astype(np.float64) / np.where(scales == 0, 1, scales).astype(np.float64)[..., None]
    np.testing.assert_allclose(abs(exact - np.floor(exact) - 0.5)[unsure], 0, atol=2e-5)


@pytest.mark.parametrize("weight", [tags.Q40, tags.Q80], ids=lambda tag: tag.name)
@given(arrays(np.float32, (2, 64), elements=normal_floats))
def test_rounds_as_the_file_format_does(weight, x):
    ints, scales, sums = act_blocks(to_acts(weight, tags.Q80, x))
    assert_rounds_like_the_format(x, ints, scales)
    np.testing.assert_array_equal(sums, -8 * ints.astype(int).sum(-1))


def test_halves_round_to_even():
    """With 127 in the block the scale is 1, and the halves are exact."""
    x = np.concatenate([[127.0], np.arange(-15, 16) + 0.5]).astype(np.float32)[None]
    ints, scales, _ = act_blocks(to_acts(tags.Q40, tags.Q80, x))
    assert scales.item() == 1
    np.testing.assert_array_equal(ints[0, 0], np.rint(x[0]))


@pytest.mark.parametrize("tiny", [0.0, 1e-45, 1e-39, 1e-37])
@formats
def test_blocks_of_nothing(weight, tiny):
    """Zeros, and values so small that 127 over them overflows, beside an ordinary block."""
    x = np.zeros((1, 64), np.float32)
    x[0, 3], x[0, 32:] = tiny, 1.0
    acts = to_acts(weight, tags.Q80, x)
    if weight.block == 1:
        values = acts.view(np.float32)[0]
    else:
        ints, scales, sums = act_blocks(acts)
        values = (ints * scales[..., None]).ravel()
        if tiny == 0:
            assert not ints[0, 0].any() and not scales[0, 0] and not sums[0, 0]
    np.testing.assert_allclose(values[:32], x[0, :32], atol=1e-29)
    np.testing.assert_allclose(values[32:], 1.0, rtol=1e-6)


@pytest.mark.parametrize("weight", [tags.F32, tags.F16], ids=lambda tag: tag.name)
@pytest.mark.parametrize("n", [1, 31, 33, 160])
def test_with_float_weights_the_rounded_values_stay_floats(weight, n):
    x = np.random.default_rng(n).standard_normal((3, n)).astype(np.float32)
    found = to_acts(weight, tags.Q80, x).view(np.float32)
    ints, scales, _ = act_blocks(to_acts(tags.Q40, tags.Q80, x))
    np.testing.assert_array_equal(found, (ints * scales[..., None]).reshape(3, -1))


@formats
@pytest.mark.parametrize("n", [32, 96, 320])
def test_floats_pass_unchanged(weight, n):
    x = np.random.default_rng(n).standard_normal((3, n)).astype(np.float32)
    np.testing.assert_array_equal(to_acts(weight, tags.F32, x).view(np.float32), x)


@pytest.mark.parametrize("act", [tags.F32, tags.Q80], ids=lambda tag: tag.name)
@formats
def test_a_row_may_be_converted_in_parts(weight, act):
    x = np.random.default_rng(1).standard_normal((2, 32 * 7)).astype(np.float32)
    np.testing.assert_array_equal(to_acts(weight, act, x, parts=3), to_acts(weight, act, x))
