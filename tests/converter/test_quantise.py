"""The converter's quantiser: against its formulas in numpy, the least error there is, and the reference quantiser."""

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from converter.quantise import NEGLIGIBLE, STEPS, WEIGHTED_STEPS, quantise
from dllama.embedded import model_path
from dllama.formats import FloatType, ModelFile, dequantize, quantize
from dllama.formats.tensor import to_float32

Q40 = FloatType.Q40
F32 = np.float32


def random_rows(kind: str, rows: int = 96, columns: int = 1024, seed: int = 0) -> np.ndarray:
    """float32 [rows, columns] of weights as they may come, of standard deviation about 0.02."""
    random = np.random.default_rng(seed)
    draw = {
        "gaussian": lambda size: random.standard_normal(size),
        "laplace": lambda size: random.laplace(size=size) / np.sqrt(2),
        "student t": lambda size: random.standard_t(4, size=size) / np.sqrt(2),
    }
    return (0.02 * draw[kind]((rows, columns))).astype(F32)


def embedded_rows() -> np.ndarray:
    """Trained weights as they were before any rounding: the embedded model's embedding is its output matrix, too."""
    with ModelFile(model_path()) as model:
        return model.f32("embedding").copy()


def errors(raw: np.ndarray, x: np.ndarray, weights: np.ndarray | float = 1.0) -> np.ndarray:
    """Each block's sum of weights * (x - what is stored)^2, float64."""
    rest = dequantize(raw, Q40, x.shape[1]).astype(np.float64) - x
    return (weights * rest * rest).reshape(-1, 32).sum(axis=1)


def formula(x: np.ndarray, w: np.ndarray, steps: np.ndarray) -> np.ndarray:
    """The search in numpy, an operation at a time: blocks and weights, float32 [blocks, 32] -> uint8 [blocks, 18]."""

    def codes(v, inverse):
        return np.clip(np.rint(v * inverse[:, None]), F32(-8), F32(7))

    def inverted(d):
        return np.where(d == 0, F32(0), F32(1) / np.where(d == 0, F32(1), d))

    def total(terms):
        out = np.zeros(len(terms), F32)
        for j in range(32):
            out += terms[:, j]
        return out

    largest = x[np.arange(len(x)), np.abs(x).argmax(axis=1)]
    unit = np.where(np.abs(largest) > NEGLIGIBLE, inverted(largest), F32(0))
    v = x * unit[:, None]
    scale, most = np.zeros(len(x), F32), np.full(len(x), F32(-1))
    for step in [*steps, None]:
        c = codes(v, inverted(scale) if step is None else np.full(len(x), -step))
        xc, cc = total(w * c * v), total(w * c * c)
        fitted = xc / np.maximum(cc, F32(1e-30))
        better = fitted * xc > most
        scale, most = np.where(better, fitted, scale), np.maximum(most, fitted * xc)
    halves = [d.astype("<f2") for d in (largest / F32(-8), np.clip(scale * largest, F32(-65504), F32(65504)))]
    ds = [half.astype(F32) * unit for half in halves]
    rests = [v - d[:, None] * codes(v, inverted(d)) for d in ds]
    found = total(w * (rests[1] * rests[1])) < total(w * (rests[0] * rests[0]))
    q = (codes(v, inverted(np.where(found, ds[1], ds[0]))) + 8).astype(np.uint8)
    half = np.where(found, halves[1], halves[0])
    return np.concatenate([half[:, None].view(np.uint8), q[:, :16] | q[:, 16:] << 4], axis=1)


def least_errors(x: np.ndarray, w: np.ndarray) -> np.ndarray:
    """The least error of each block at any scale, float64 [blocks]: the codes change at 1 / d = (k + 1/2) / x only."""
    gain = np.zeros(len(x))
    for sign in (1, -1):  # values of this sign have codes up to 7, the others up to 8
        size, k = np.abs(x)[:, :, None], np.arange(8)
        with np.errstate(divide="ignore"):
            place = np.where((x[:, :, None] * sign > 0) & (k == 7), np.inf, (k + 0.5) / size)
        order = place.reshape(len(x), -1).argsort(axis=1)
        xc = np.broadcast_to(w[:, :, None] * size, place.shape).reshape(order.shape)
        cc = (w[:, :, None] * (2 * k + 1)).reshape(order.shape)
        xc, cc = (np.take_along_axis(terms, order, axis=1).cumsum(axis=1) for terms in (xc, cc))
        usable = np.isfinite(np.take_along_axis(place.reshape(order.shape), order, axis=1))
        gain = np.maximum(gain, np.where(usable, xc * xc / cc, 0).max(axis=1))
    return (w * x * x).sum(axis=1) - gain


@pytest.mark.parametrize("blocks", [1, 63, 64, 65, 300])
def test_bytes_are_those_of_the_formula_on_every_machine(blocks):
    x = np.concatenate([random_rows("gaussian", blocks, 32), random_rows("student t", blocks, 32)])
    assert quantise(x, Q40).tobytes() == formula(x, np.ones_like(x), STEPS).tobytes()


@pytest.mark.parametrize("columns", [32, 288, 2048, 2080])
def test_weighted_bytes_are_those_of_the_formula(columns):
    x = random_rows("laplace", 7, columns)
    importance = np.random.default_rng(1).lognormal(0, 1, columns).astype(F32)
    w = np.tile(importance, 7).reshape(-1, 32)
    expected = formula(x.reshape(-1, 32), w, WEIGHTED_STEPS)
    assert quantise(x, Q40, importance=importance).tobytes() == expected.tobytes()


@pytest.mark.parametrize("dtype", ["F16", "BF16"])
@pytest.mark.parametrize("rows", [1, 2, 5])
@pytest.mark.parametrize("importance", [None, np.linspace(0.1, 2, 1056, dtype=F32)])
def test_halves_give_the_bytes_of_their_numbers(dtype, rows, importance):
    """Rows of 33 blocks; with subnormal numbers, and zeros of both signs."""
    x = random_rows("student t", rows, 1056)
    x[:, ::3] *= F32(2.0**-12)
    x[:, 64:96], x[:, 100], x[:, 101] = F32(2.0**-24), F32(0), F32(-0.0)
    halves = x.astype("<f2").view("<u2") if dtype == "F16" else (x.view("<u4") >> 16).astype("<u2")
    numbers = to_float32(halves, dtype).reshape(x.shape)
    for reference in (False, True):
        found = quantise(halves, Q40, dtype=dtype, importance=importance, reference=reference)
        expected = quantise(numbers, Q40, importance=importance, reference=reference)
        np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "dtype, largest, bad", [("F16", 0x7BFF, [0x7C00, 0xFC00, 0x7C01, 0xFFFF]), ("BF16", 0x487E, [0x7F80, 0xFFC0])]
)
def test_halves_that_are_not_finite_are_refused(dtype, largest, bad):
    halves = np.zeros((3, 64), "<u2")
    halves[2, 41] = largest
    quantise(halves, Q40, dtype=dtype)
    for value in bad:
        halves[2, 40] = value
        with pytest.raises(ValueError, match="not finite"):
            quantise(halves, Q40, dtype=dtype)


# What the reference's error is multiplied by; the least possible is 0.885, 0.912, 0.922 and 0.88 of it.
@pytest.mark.parametrize("kind, ratio", [("gaussian", 0.89), ("laplace", 0.917), ("student t", 0.926)])
def test_error_of_random_weights_against_the_reference(kind, ratio):
    x = random_rows(kind)
    assert errors(quantise(x, Q40), x).sum() < ratio * errors(quantize(x, Q40), x).sum()


def test_error_of_trained_weights_against_the_reference():
    x = embedded_rows()
    assert errors(quantise(x, Q40), x).sum() < 0.89 * errors(quantize(x, Q40), x).sum()


@pytest.mark.parametrize("spread, excess", [(None, 1.004), (0.5, 1.004), (1.0, 1.015)])
def test_error_is_close_to_the_least_there_is(spread, excess):
    x, importance = random_rows("gaussian", 48, 512), None
    w = np.ones_like(x)
    if spread:
        importance = np.random.default_rng(2).lognormal(0, spread, 512).astype(F32)
        w = np.broadcast_to(importance, x.shape)
    found = errors(quantise(x, Q40, importance=importance), x, w)
    least = least_errors(x.reshape(-1, 32).astype(np.float64), w.reshape(-1, 32).astype(np.float64))
    assert least.sum() * (1 - 1e-6) <= found.sum() < excess * least.sum()


any_size = st.sampled_from([1e-42, 1e-12, 3e-8, 1e-7, 1e-6, 1e-4, 0.02, 1.0, 5e2, 6e4, 5.2e5])
blocks = st.builds(
    lambda values, size, outlier, place: (np.where(np.arange(32) == place, outlier, values) * size).astype(F32)[None],
    hnp.arrays(F32, 32, elements=st.floats(-1, 1, width=32) | st.sampled_from([0.0, -0.0, 1.0, -1.0, 0.5])),
    any_size,
    st.sampled_from([0.0, 1.0, -1.0, 1e-3]),
    st.integers(0, 40),
)


@given(blocks)
def test_no_block_is_worse_than_the_reference_s(x):
    reference = errors(quantize(x, Q40), x)
    assert errors(quantise(x, Q40), x) <= reference * (1 + 1e-5)


@given(blocks, hnp.arrays(F32, 32, elements=st.floats(0.125, 8, width=32)))
def test_no_weighted_block_is_worse_than_the_reference_s(x, importance):
    reference = errors(quantize(x, Q40), x, importance)
    assert errors(quantise(x, Q40, importance=importance), x, importance) <= reference * (1 + 1e-5)


def test_an_outlier_that_hardly_matters_is_cut():
    x = (0.15 * np.random.default_rng(4).standard_normal((1, 32))).astype(F32)
    x[0, 5] = 1.0
    importance = np.ones(32, F32)
    importance[5] = 1e-3
    raw = quantise(x, Q40, importance=importance)
    assert dequantize(raw, Q40, 32)[0, 5] < 0.7
    assert errors(raw, x, importance) < 0.5 * errors(quantize(x, Q40), x, importance)


def test_an_outlier_that_matters_is_kept():
    x = np.full((1, 32), 0.001, F32)
    x[0, 5] = 1.0
    assert dequantize(quantise(x, Q40), Q40, 32)[0, 5] == pytest.approx(1, rel=2**-10)


def test_blocks_of_zeros():
    for zeros in (np.zeros((1, 32), F32), np.full((1, 32), -0.0, F32), np.full((1, 32), 1e-45, F32)):
        assert not dequantize(quantise(zeros, Q40), Q40, 32).any()


def test_columns_without_importance_are_still_written():
    x = random_rows("gaussian", 4, 64)
    for importance in (np.zeros(64, F32), np.repeat([0, 1], 32).astype(F32)):
        back = dequantize(quantise(x, Q40, importance=importance), Q40, 64)
        assert (np.abs(back - x) <= np.abs(x).max() / 7).all()


def test_importance_lessens_the_error_that_it_weighs():
    x = random_rows("gaussian", 64, 512)
    importance = np.random.default_rng(3).lognormal(0, 1, 512).astype(F32)
    plain, weighted = (errors(quantise(x, Q40, importance=i), x, importance).sum() for i in (None, importance))
    assert weighted < 0.9 * plain
    # Only proportions count.
    assert np.array_equal(*(quantise(x, Q40, importance=importance * F32(scale)) for scale in (1, 2.0**40)))


@pytest.mark.parametrize("importance", [None, np.linspace(0.1, 2, 96, dtype=F32)])
def test_rows_do_not_depend_on_those_around_them(importance):
    x = random_rows("student t", 200, 96)
    whole = quantise(x, Q40, importance=importance)
    parts = [x[:1], x[1:90], x[90:]]
    with ThreadPoolExecutor(3) as threads:
        pieces = list(threads.map(lambda part: quantise(part, Q40, importance=importance), parts))
    np.testing.assert_array_equal(np.concatenate(pieces), whole)


@pytest.mark.parametrize("float_type", FloatType)
def test_reference_bytes(float_type):
    x = random_rows("laplace", 5, 96)
    expected = quantize(x, float_type)
    importance = np.linspace(0, 1, 96, dtype=F32)
    np.testing.assert_array_equal(quantise(x, float_type, importance=importance, reference=True), expected)
    assert np.array_equal(quantise(x, float_type), expected) == (float_type is not Q40)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(bad):
    x = random_rows("gaussian", 3, 64)
    x[2, 40] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantise(x, Q40)


def test_scales_beyond_f16_are_refused():
    x = np.full((1, 32), 8 * 65504, F32)
    assert dequantize(quantise(x, Q40), Q40, 32).max() == 8 * 65504
    with pytest.raises(ValueError, match="65504"):
        quantise(np.nextafter(x, F32(np.inf)), Q40)


def test_shapes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        quantise(np.zeros((1, 33), F32), Q40)
    with pytest.raises(ValueError, match="rows of 64 columns"):
        quantise(np.zeros((1, 64), F32), Q40, importance=np.ones(32, F32))
    assert quantise(np.zeros((0, 64), F32), Q40).shape == (0, 36)
