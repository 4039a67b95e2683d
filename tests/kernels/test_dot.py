"""Rows of weights of any format times rows of floats, against float64."""

import numpy as np
import pytest

from dllama.kernels import dot, tags
from tests.kernels.calls import multiply_rows, stored

UNBLOCKED, BLOCKED = [1, 2, 15, 16, 17, 31, 33, 100, 257], [32, 64, 96, 1184]


@pytest.mark.parametrize(
    "weight, columns",
    [(tag, n) for tag in (tags.F32, tags.F16) for n in UNBLOCKED + BLOCKED]
    + [(tag, n) for tag in (tags.Q40, tags.Q80) for n in BLOCKED],
    ids=lambda value: getattr(value, "name", value),
)
@pytest.mark.parametrize("tokens", [1, 2, dot.TOKENS, dot.TOKENS + 1, 3 * dot.TOKENS])
def test_product_of_random_matrices(weight, columns, tokens):
    rng = np.random.default_rng([columns, tokens])
    raw, w = stored(weight, rng.standard_normal((7, columns)).astype(np.float32))
    x = rng.standard_normal((tokens, columns)).astype(np.float32)
    apart = np.full((len(raw), raw.shape[1] + 6), 0x7F, np.uint8)  # NaN follows each row, and must not be read
    apart[:, : raw.shape[1]] = raw
    found = multiply_rows(weight, apart[:, : raw.shape[1]], columns, x)
    x = x.astype(np.float64)
    np.testing.assert_array_less(abs(found - x @ w.T), 1e-6 * (abs(x) @ abs(w.T)) + 1e-30)


@pytest.mark.parametrize("weight", [tags.Q40, tags.Q80], ids=lambda tag: tag.name)
def test_every_value_of_a_block_is_read_in_its_place(weight):
    """Columns of the identity give back the stored weights, exactly."""
    rng = np.random.default_rng(2)
    raw, w = stored(weight, rng.standard_normal((5, 64)).astype(np.float32))
    np.testing.assert_array_equal(multiply_rows(weight, raw, 64, np.eye(64, dtype=np.float32)), w.T)
