"""Quantised weights times quantised activations, against float64."""

import numpy as np
import pytest

from dllama.kernels import packed, tags
from dllama.kernels.team import Team
from tests.kernels.calls import act_blocks, acts_of, multiply_packed, stored, to_acts

weights = pytest.mark.parametrize("weight", [tags.Q40, tags.Q80], ids=lambda tag: tag.name)


@pytest.fixture(scope="module", params=[1, 3], ids=lambda n: f"{n} threads")
def team(request):
    team = Team(request.param)
    yield team
    team.close()


def random_acts(rng, tokens, columns):
    """Packed acts of normal values, and the float64 values that they stand for."""
    acts = to_acts(tags.Q80, tags.Q80, rng.standard_normal((tokens, columns)).astype(np.float32))
    ints, scales, _ = act_blocks(acts)
    return acts, (ints * scales.astype(np.float64)[..., None]).reshape(tokens, columns)


@weights
@pytest.mark.parametrize(
    "rows, columns",
    [(1, 32), (packed.ROWS, 32), (packed.ROWS - 1, 64), (packed.ROWS + 1, 96), (3 * packed.ROWS + 5, 32 * 37)],
)
@pytest.mark.parametrize("tokens", range(1, 21))
def test_product_of_random_matrices(team, weight, rows, columns, tokens):
    rng = np.random.default_rng([rows, columns, tokens])
    raw, w = stored(weight, rng.standard_normal((rows, columns)).astype(np.float32))
    acts, x = random_acts(rng, tokens, columns)
    found = multiply_packed(team, weight, raw, columns, acts)
    # Each output may err by float32's rounding of the sum of its terms' magnitudes.
    np.testing.assert_array_less(abs(found - x @ w.T), 1e-6 * (abs(x) @ abs(w.T)) + 1e-30)


def blocks_of(weight, ints, rows, blocks):
    """Stored rows whose every weight is the stored integer ``ints`` [32], scales 1."""
    if weight is tags.Q40:
        body = (ints[:16] | ints[16:] << 4).astype(np.uint8)
    else:
        body = ints.astype(np.int8).view(np.uint8)
    block = np.concatenate([np.float16(1).reshape(1).view(np.uint8), body])
    return np.tile(block, (rows, blocks)), ints - (8 if weight is tags.Q40 else 0)


@pytest.mark.parametrize("weight, low, high", [(tags.Q40, 0, 15), (tags.Q80, -128, 127)], ids=["q40", "q80"])
@pytest.mark.parametrize("tokens", [1, 2, packed.FEW, packed.TOKENS + 1])
@pytest.mark.parametrize("blocks", [1, 29])
def test_sums_of_extreme_values_are_exact(team, weight, low, high, tokens, blocks):
    """No instruction may saturate or wrap: all at one end, at the other, and alternating, against activations of
    ±127. Below 2^24 the float32 sums of these integers are exact, too."""
    alternating = np.where(np.arange(32) % 2, low, high)
    patterns = [np.full(32, low), np.full(32, high), alternating, low + high - alternating, np.repeat([low, high], 16)]
    activations = [np.full(32, 127), np.full(32, -127), np.where(np.arange(32) % 2, 127, -127), np.zeros(32, int)]
    for pattern in patterns:
        raw, w = blocks_of(weight, pattern, packed.ROWS + 3, blocks)
        for values in activations:
            ints = np.broadcast_to(values.astype(np.int8), (tokens, blocks, 32)).copy()
            found = multiply_packed(team, weight, raw, 32 * blocks, acts_of(ints, np.ones((tokens, blocks))))
            expected = blocks * int(w @ values)
            assert abs(expected) < 1 << 24
            np.testing.assert_array_equal(found, np.full(found.shape, expected))


@weights
def test_integer_sums_of_random_bytes_are_exact(team, weight):
    """Every nibble and every int8, in every place."""
    rng = np.random.default_rng(5)
    rows, blocks, tokens = 4 * packed.ROWS + 1, 3, 5
    raw = rng.integers(0, 256, (rows, blocks, weight.nbytes), dtype=np.uint8)
    raw[..., :2] = np.float16(1).reshape(1).view(np.uint8)
    body = raw[..., 2:]
    w = np.concatenate([body & 15, body >> 4], -1).astype(int) - 8 if weight is tags.Q40 else body.view(np.int8)
    ints = rng.integers(-127, 128, (tokens, blocks, 32)).astype(np.int8)
    found = multiply_packed(team, weight, raw.reshape(rows, -1), 32 * blocks, acts_of(ints, np.ones((tokens, blocks))))
    expected = ints.reshape(tokens, -1).astype(int) @ w.reshape(rows, -1).astype(int).T
    np.testing.assert_array_equal(found, expected)


@weights
def test_rows_of_a_wider_matrix(team, weight):
    """Weights are packed from rows that lie further apart than they are long."""
    rng = np.random.default_rng(6)
    raw, w = stored(weight, rng.standard_normal((packed.ROWS + 2, 128)).astype(np.float32))
    acts, x = random_acts(rng, 2, 64)
    found = multiply_packed(team, weight, raw[:, : raw.shape[1] // 2], 64, acts)
    np.testing.assert_allclose(found, x @ w[:, :64].T, rtol=1e-5, atol=1e-5)


@weights
def test_scales_at_the_ends_of_half_precision(team, weight):
    """Subnormal scales and the largest one."""
    for scale in (2.0**-24, 2.0**-14, 65504.0):
        raw, w = blocks_of(weight, np.arange(32) % 16, packed.ROWS, 2)
        raw.reshape(packed.ROWS, 2, -1)[..., :2] = np.float16(scale).reshape(1).view(np.uint8)
        ints = np.ones((1, 2, 32), np.int8)
        found = multiply_packed(team, weight, raw, 64, acts_of(ints, np.full((1, 2), 0.5)))
        np.testing.assert_array_equal(found, np.full(found.shape, np.float32(2 * w.sum() * scale * 0.5)))
