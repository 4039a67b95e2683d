"""A and B out of a seed, against the description of the stream followed in plain Python."""

import math

import numpy as np
import pytest

from dllama.privatelora.frozen import MAX_SEED, frozen_matrix

WORD = (1 << 64) - 1


def philox(counter: int, key: tuple[int, int]) -> list[int]:
    """Four words of Philox4x64-10, from the paper's figures."""
    c = [counter, 0, 0, 0]
    k0, k1 = key
    for _ in range(10):
        first, second = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
        c = [(second >> 64) ^ c[1] ^ k0, second & WORD, (first >> 64) ^ c[3] ^ k1, first & WORD]
        k0, k1 = (k0 + 0x9E3779B97F4A7C15) & WORD, (k1 + 0xBB67AE8584CAA73B) & WORD
    return c


def described(seed: int, stream: int, count: int) -> list[float]:
    """The first values of a stream, as the module's text has them."""
    words = [word for block in range(count // 4 + 1) for word in philox(1 + block, (seed, stream))]
    values = []
    for w, other in zip(words[::2], words[1::2], strict=True):
        u, angle = ((w >> 11) + 1) / 2**53, 2 * math.pi * (other >> 11) / 2**53
        radius = 0.02 * math.sqrt(-2 * math.log(u))
        values += [radius * math.cos(angle), radius * math.sin(angle)]
    return values[:count]


@pytest.mark.parametrize(
    "seed, layer, target, matrix, stream",
    [(0, 0, "q", "A", 0), (7, 0, "q", "B", 1), (7, 3, "v", "A", 46), (MAX_SEED, 2, "down", "B", 41)],
)
@pytest.mark.parametrize("shape", [(3, 5), (4, 8)])
def test_any_program_can_make_the_same(seed, layer, target, matrix, stream, shape):
    found = frozen_matrix(seed, layer, target, matrix, shape)
    assert found.dtype == np.float32 and found.shape == shape
    np.testing.assert_allclose(found.ravel(), described(seed, stream, shape[0] * shape[1]), rtol=1e-6)


def test_a_normal_distribution_of_deviation_0_02():
    values = frozen_matrix(1, 0, "k", "A", (200, 500)).astype(np.float64) / 0.02
    moments = [(values**power).mean() for power in (1, 2, 3, 4)]
    np.testing.assert_allclose(moments, [0, 1, 0, 3], atol=0.05)


def test_streams_are_independent():
    streams = [
        frozen_matrix(seed, layer, target, matrix, (40, 50)).ravel()
        for seed in (0, 1) for layer in (0, 1) for target in ("q", "k") for matrix in ("A", "B")
    ]  # fmt: skip
    correlation = np.corrcoef(streams) - np.eye(len(streams))
    assert abs(correlation).max() < 0.1  # 4.5 standard deviations
