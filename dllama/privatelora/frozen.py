"""A and B out of a seed, the same numbers in any program that follows this description.

Philox4x64-10 (Salmon et al., 2011; numpy's ``Philox``, whose bit stream is guaranteed) gives each matrix a stream of
its own: 64-bit words under the key (seed, stream number), the counter beginning at 1, four words of each block lowest
first. The stream number is ``2·(7·layer + target) + matrix``: targets count from 0 in the order q, k, v, o, gate, up,
down; A is 0 and B is 1. Two words w, w' give two neighbouring values, row after row (Box and Muller, 1958)::

    u = (floor(w / 2^11) + 1) / 2^53        in (0, 1]
    u' = floor(w' / 2^11) / 2^53            in [0, 1)
    0.02·√(-2·ln u)·cos(2π·u'),  0.02·√(-2·ln u)·sin(2π·u')

in float64, rounded to float32. Where libraries differ in the last bit of a logarithm or a cosine, about one value in
10^8 differs in the last bit of its float32.
"""

import numpy as np

from dllama.targets import TARGETS

STANDARD_DEVIATION = 0.02
MAX_SEED = (1 << 64) - 1
MATRICES = ("A", "B")


def frozen_matrix(seed: int, layer: int, target: str, matrix: str, shape: tuple[int, int]) -> np.ndarray:
    """The matrix "A" or "B" of a target in a layer: float32 of ``shape``, N(0, 0.02).

    seed: 0 to MAX_SEED
    """
    stream = 2 * (len(TARGETS) * layer + list(TARGETS).index(target)) + MATRICES.index(matrix)
    key = np.array([seed, stream], np.uint64)
    count = shape[0] * shape[1]
    words = np.random.Philox(key=key).random_raw(count + count % 2).reshape(-1, 2)
    uniform = (words >> np.uint64(11)).astype(np.float64)
    uniform[:, 0] += 1
    uniform *= 2.0**-53
    radius = STANDARD_DEVIATION * np.sqrt(-2 * np.log(uniform[:, 0]))
    angle = 2 * np.pi * uniform[:, 1]
    values = np.empty(words.shape, np.float32)
    values[:, 0] = radius * np.cos(angle)
    values[:, 1] = radius * np.sin(angle)
    return values.ravel()[:count].reshape(shape)
