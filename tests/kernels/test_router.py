"""Arithmetic by which the nodes of a cluster choose alike: the bits are told, whatever the CPU."""

import numpy as np
import pytest

from dllama.kernels import router
from tests.kernels.calls import pad, padded, rms_norm, room


def lanes_summed(terms: np.ndarray) -> np.float32:
    """float32 [n] added in the kernels' order: 16 running sums, then halves on halves."""
    sums = np.zeros(16, np.float32)
    for step in np.pad(terms, (0, -len(terms) % 16)).reshape(-1, 16):
        sums = sums + step
    while len(sums) > 1:
        sums = sums[: len(sums) // 2] + sums[len(sums) // 2 :]
    return sums[0]


@pytest.mark.parametrize("columns", [1, 16, 60, 2048])
@pytest.mark.parametrize("tokens", [1, 2, 4, 9])
def test_the_router_s_product_to_the_bit(columns, tokens):
    random = np.random.default_rng(columns + tokens)
    w = random.standard_normal((5, columns), dtype=np.float32)
    x = random.standard_normal((tokens, columns), dtype=np.float32)
    tiles = padded(tokens, router.TOKENS) if tokens > 1 else 1
    rows = np.zeros((tiles, padded(columns)), np.float32)
    rows[:tokens] = pad(x)
    with room(tiles * 4 * 8) as out:
        router.multiply_router(
            w.ctypes.data, 5, columns, rows.ctypes.data, rows.strides[0], tokens, out.ctypes.data, 4 * 8
        )
    found = out.view(np.float32).reshape(tiles, 8)[:tokens, :5]
    np.testing.assert_array_equal(found, [[lanes_summed(row * token) for row in w] for token in x])


@pytest.mark.parametrize("n", [20, 64, 4096])
def test_the_norm_to_the_bit(n):
    random = np.random.default_rng(n)
    x, weight = random.standard_normal((2, n), dtype=np.float32)
    epsilon = np.float32(1e-6)
    factor = np.float32(1) / np.sqrt(lanes_summed(x * x) / np.float32(n) + epsilon)
    np.testing.assert_array_equal(rms_norm(x, weight, epsilon)[:n], x * factor * weight)
