"""Norms, activations, softmax and exp, against float64."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.kernels import tags
from dllama.kernels.elementwise import SUMMANDS
from tests.kernels.calls import add, add_summands, exp, gelu_times, rms_norm, silu_times, softmax

SIZES = [1, 2, 15, 16, 17, 31, 32, 33, 100, 2048]
sizes = pytest.mark.parametrize("n", SIZES)


def normal(n, seed, scale=1.0):
    return (scale * np.random.default_rng([n, seed]).standard_normal(n)).astype(np.float32)


def sigmoid(x):
    with np.errstate(over="ignore"):
        return 1 / (1 + np.exp(-x))


@sizes
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_rms_norm(n, scale):
    x, weight = normal(n, 1, scale), normal(n, 2)
    exact = x.astype(np.float64)
    found = rms_norm(x, weight, 1e-5)
    np.testing.assert_allclose(found[:n], exact / np.sqrt((exact**2).mean() + 1e-5) * weight, rtol=1e-6)
    assert not found[n:].any()


def test_rms_norm_of_zeros():
    assert not rms_norm(np.zeros(40, np.float32), np.ones(40, np.float32), 1e-6).any()


@sizes
def test_add(n):
    x, y = normal(n, 1), normal(n, 2)
    np.testing.assert_array_equal(add(x, y)[:n], x + y)


@sizes
@pytest.mark.parametrize("form", [tags.F32, tags.F16], ids=lambda form: form.name)
@pytest.mark.parametrize("rows", [1, 2])
def test_add_summands(n, form, rows):
    random = np.random.default_rng(n)
    x, factors = (random.standard_normal((rows, width), np.float32) for width in (n, SUMMANDS))
    y = random.standard_normal((SUMMANDS, n)).astype(np.float32 if form is tags.F32 else np.float16)
    exact = x.astype(np.float64) + factors.astype(np.float64) @ y.astype(np.float64)
    np.testing.assert_allclose(add_summands(form, x, y, factors), exact, rtol=1e-5, atol=1e-5)


@sizes
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_silu_times(n, scale):
    gate, up = normal(n, 1, scale), normal(n, 2)
    exact = gate.astype(np.float64)
    found = silu_times(gate, up)
    np.testing.assert_allclose(found[:n], exact * sigmoid(exact) * up, rtol=1e-6, atol=1e-30)
    assert not found[n:].any()


@sizes
@pytest.mark.parametrize("scale", [0.1, 3.0, 40.0])
def test_gelu_times(n, scale):
    gate, up = normal(n, 1, scale), normal(n, 2)
    exact = gate.astype(np.float64)
    inner = np.sqrt(2 / np.pi) * (exact + 0.044715 * exact**3)
    expected = exact * sigmoid(2 * inner) * up
    # Where 1 + e^-z is all e^-z, the float32 rounding of z counts z times over.
    bound = abs(expected) * (1e-6 + 3e-7 * abs(np.clip(inner, -44, 0))) + 1e-30
    np.testing.assert_array_less(abs(gelu_times(gate, up)[:n] - expected), bound)


@pytest.mark.parametrize("function", [silu_times, gelu_times])
def test_activations_of_huge_values_stay_finite(function):
    gate = np.array([-1e30, -1e10, -200, -88, 88, 200, 1e10, 1e30], np.float32)
    found = function(gate, np.ones(8, np.float32))[:8]
    np.testing.assert_allclose(found[4:], gate[4:], rtol=1e-6)
    np.testing.assert_array_less(abs(found[:4]), 1e-6 * abs(gate[:4]) + 1e-30)


@given(st.integers(1, 300), st.floats(0, 60, width=32), st.integers(0, 1000))
def test_softmax(n, spread, seed):
    scores = np.random.default_rng(seed).uniform(-spread, spread, n).astype(np.float32)
    found, total = softmax(scores)
    expected = np.exp(scores.astype(np.float64) - scores.max())
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-37)  # scores - max itself rounds
    assert total == pytest.approx(expected.sum(), rel=1e-5)


@pytest.mark.parametrize("offset", [-1e4, 0.0, 1e4])
def test_softmax_looks_at_differences_alone(offset):
    scores = np.arange(20, dtype=np.float32)
    found, _ = softmax(scores + np.float32(offset))
    np.testing.assert_allclose(found, np.exp(np.arange(20.0) - 19), rtol=1e-6)


def test_exp_errs_by_less_than_its_bound():
    x = np.linspace(-87, 87, 1 << 18, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert (abs(exp(x) - exact) / exact).max() < 2e-7


def test_exp_beyond_its_range_is_clamped():
    found = exp(np.array([-np.inf, -1e30, -100.0, -88.0, 88.0, 100.0, 1e30, np.inf] * 2, np.float32))
    assert (found[:4] < 2e-38).all() and (found[:4] >= 0).all()
    assert np.isfinite(found[4:8]).all() and (found[4:8] > 6e37).all()
