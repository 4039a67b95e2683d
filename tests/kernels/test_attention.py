"""The KV cache's formats, and attention over them, against float64."""

import numpy as np
import pytest

from dllama.kernels import tags
from dllama.kernels.attention import HEADS
from tests.kernels.calls import attend, from_cache, pad, to_cache
from tests.kernels.test_acts import assert_rounds_like_the_format

CACHES = [tags.F32, tags.F16, tags.Q80]
HEAD_DIMS = [2, 16, 20, 32, 36, 64, 80, 128]
caches = pytest.mark.parametrize("cache", CACHES, ids=lambda tag: tag.name)
head_dims = pytest.mark.parametrize("head_dim", HEAD_DIMS)


def normal(*shape, seed=0):
    return np.random.default_rng([*shape, seed]).standard_normal(shape).astype(np.float32)


def exact_attention(queries, keys, values):
    """float64 [heads, head_dim]: softmax(q·Kᵀ/√head_dim)·V."""
    queries, keys, values = (x.astype(np.float64) for x in (queries, keys, values))
    scores = queries @ keys.T / np.sqrt(queries.shape[1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True) @ values


@caches
@head_dims
@pytest.mark.parametrize("heads", [1, HEADS])
def test_attention(cache, head_dim, heads):
    for positions in (*range(1, 20), 33, 200):
        queries = 2 * normal(heads, head_dim, seed=1)
        keys, values = (to_cache(cache, normal(positions, head_dim, seed=seed)) for seed in (2, 3))
        expected = exact_attention(queries, *(from_cache(cache, rows, head_dim) for rows in (keys, values)))
        found = attend(cache, queries, keys, values, head_dim)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=3e-6, err_msg=f"{positions} positions")


@caches
def test_heads_worked_together_are_those_worked_alone(cache):
    queries = normal(HEADS, 48)
    keys, values = (to_cache(cache, normal(77, 48, seed=seed)) for seed in (1, 2))
    alone = [attend(cache, queries[h : h + 1], keys, values, 48)[0] for h in range(HEADS)]
    np.testing.assert_allclose(attend(cache, queries, keys, values, 48), alone, rtol=1e-5, atol=1e-6)


@caches
def test_attention_to_one_position_among_many(cache):
    """Scores far apart: everything but the best underflows."""
    queries = np.full((1, 32), 20, np.float32)
    keys = np.full((50, 32), -20, np.float32)
    keys[31] = 20
    values = normal(50, 32)
    rows = to_cache(cache, values)
    found = attend(cache, queries, to_cache(cache, keys), rows, 32)
    np.testing.assert_allclose(found[0], from_cache(cache, rows, 32)[31], rtol=1e-6)


@caches
def test_rows_may_lie_apart(cache):
    """A cache row is followed by others that do not belong to the head."""
    keys, values = (to_cache(cache, normal(9, 40, seed=seed)) for seed in (1, 2))
    apart = [np.full((9, rows.shape[1] + 10), 0x7F, np.uint8) for rows in (keys, values)]
    for wide, rows in zip(apart, (keys, values), strict=True):
        wide[:, : rows.shape[1]] = rows
    expected = attend(cache, normal(1, 40), keys, values, 40)
    found = attend(cache, normal(1, 40), *(wide[:, : keys.shape[1]] for wide in apart), 40)
    np.testing.assert_array_equal(found, expected)


@head_dims
def test_float_caches_round_as_numpy_does(head_dim):
    x = normal(5, head_dim)
    np.testing.assert_array_equal(to_cache(tags.F32, x).view(np.float32), pad(x))
    np.testing.assert_array_equal(to_cache(tags.F16, x).view(np.float16), pad(x).astype(np.float16))


def test_f16_caches_hold_on_to_values_beyond_their_range():
    x = np.array([[1e9, -1e9, 65504, -65520, 70000]], np.float32)
    found = to_cache(tags.F16, x).view(np.float16)[0, :5]
    np.testing.assert_array_equal(found, np.array([65504, -65504, 65504, -65504, 65504], np.float16))


@head_dims
def test_q80_caches_round_as_the_file_format_does(head_dim):
    x = pad(normal(5, head_dim))
    blocks = to_cache(tags.Q80, x[:, :head_dim]).reshape(5, -1, 34)
    scales = abs(x.reshape(5, -1, 32)).max(-1) / np.float32(127)
    assert_rounds_like_the_format(x, blocks[..., 2:].view(np.int8).astype(int), scales)
    np.testing.assert_array_equal(blocks[..., :2].copy().view(np.float16)[..., 0], scales.astype(np.float16))
