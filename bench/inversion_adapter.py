"""What the cloud learns of M: it sends u = A·x and gets M·u back, so enough rows of both give M by least squares."""

import numpy as np

from dllama.formats import FloatType
from dllama.privatelora.frozen import frozen_matrix
from dllama.privatelora.travel import Rows

NEW_ROWS = 500


def exchange(m: np.ndarray, u: np.ndarray, float_type: FloatType) -> tuple[np.ndarray, np.ndarray]:
    """What travels: u as the edge gets it, float32 [rows, r_c2d], and its answer M·u as the cloud gets it."""
    u = _rounded(u, float_type)
    return u, _rounded(u @ m.T, float_type)


def solve_for_m(u: np.ndarray, answers: np.ndarray) -> np.ndarray:
    """The M of least squared error, and of these the smallest: [rows, r_c2d] and [rows, r_d2c] -> [r_d2c, r_c2d]."""
    return np.linalg.lstsq(u.astype(np.float64), answers.astype(np.float64), rcond=None)[0].T


def recovery(x: np.ndarray, rank: int, rows: int, float_type: FloatType, seed: int = 0) -> tuple[float, float]:
    """Relative errors (Frobenius norm) of a random M recovered from ``rows`` rows, and of its answers on new ones.

    x: inputs of a layer's query product, float32 [rows and NEW_ROWS more, dim]
    """
    random = np.random.default_rng(seed)
    m = random.standard_normal((rank, rank), dtype=np.float32)
    u = x[random.permutation(len(x))[: rows + NEW_ROWS]] @ frozen_matrix(seed, 0, "q", "A", (rank, x.shape[1])).T
    found = solve_for_m(*exchange(m, u[:rows], float_type))
    new = u[rows:]
    return _error(found, m), _error(new @ found.T, new @ m.T)


def _rounded(x: np.ndarray, float_type: FloatType) -> np.ndarray:
    rows = Rows(float_type, x.shape[1])
    return rows.decode(rows.encode(x), len(x))


def _error(found: np.ndarray, true: np.ndarray) -> float:
    return float(np.linalg.norm(found - true) / np.linalg.norm(true))
