"""Half precision and back, on every bit pattern: the plain form does it with integer arithmetic of its own."""

import numpy as np
import pytest

from tests.kernels.calls import WIDTHS, float_to_half, half_to_float

EVERY = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
FINITE = EVERY[np.isfinite(EVERY)]

widths = pytest.mark.parametrize("width", WIDTHS, ids=lambda width: width.name)


def same_bits(found, expected):
    kind = {2: np.uint16, 4: np.uint32}[found.itemsize]
    np.testing.assert_array_equal(found.view(kind), expected.view(kind))


@widths
def test_every_finite_half_widens_exactly(width):
    same_bits(half_to_float(width, FINITE), FINITE.astype(np.float32))


@widths
def test_every_finite_half_survives_the_way_back(width):
    same_bits(float_to_half(width, FINITE.astype(np.float32)), FINITE)


@widths
def test_rounds_to_nearest_and_ties_to_even(width):
    """The midpoint of every two neighbours, exact in float32, and the floats on either side of it."""
    positive = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    middle = (positive[:-1] + positive[1:]) / 2
    values = np.concatenate([middle, np.nextafter(middle, np.float32(0)), np.nextafter(middle, np.float32(1e9))])
    values = np.concatenate([values, -values])
    values = np.resize(values, -(-len(values) // 16) * 16)
    same_bits(float_to_half(width, values), values.astype(np.float16))


@widths
def test_rounds_random_floats_as_numpy_does(width):
    rng = np.random.default_rng(1)
    exponents = rng.integers(0, 127 + 15, 1 << 16).astype(np.uint32)  # from float32's subnormals up to below 32768
    bits = (
        rng.integers(0, 1 << 23, 1 << 16).astype(np.uint32)
        | exponents << 23
        | rng.integers(0, 2, 1 << 16).astype(np.uint32) << 31
    )
    values = bits.view(np.float32)
    same_bits(float_to_half(width, values), values.astype(np.float16))
