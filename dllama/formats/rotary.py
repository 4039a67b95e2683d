"""The order of q's and k's rows: which of a head's values rotary embedding turns together.

Hugging Face checkpoints, and adapters for them, turn pairs (i, i + head_dim/2); a `.m` file of rope type LLAMA or
LLAMA3_1 turns pairs (2i, 2i+1), so that its rows of q and k lie in another order. A low-rank update of q or k
(``B`` of ``W + B·A``) is added to these rows, and follows them.
"""

import numpy as np

from dllama.formats.config import ModelConfig, RopeType

TURNED = ("q", "k")


def is_reordered(matrix: str, config: ModelConfig) -> bool:
    """Whether the model file has the rows of a matrix in another order than Hugging Face."""
    return matrix in TURNED and config.rope_type is not RopeType.HALF_SPLIT


def interleave_pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows of q or k, whole heads of them, from rotary pairs (i, i + head_dim/2) to pairs (2i, 2i+1).

    rows: [heads * head_dim, n] -> the same shape
    """
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def split_pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The way back from ``interleave_pairs``."""
    pairs = rows.reshape(-1, head_dim // 2, 2, rows.shape[1])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


def to_model_order(rows: np.ndarray, matrix: str, config: ModelConfig) -> np.ndarray:
    """Rows of a matrix ("q", "o", ...) in Hugging Face's order -> the order of the model file that ``config`` is of.

    rows: [outputs of the matrix, n] -> the same shape
    """
    return interleave_pairs(rows, config.head_dim) if is_reordered(matrix, config) else rows


def to_checkpoint_order(rows: np.ndarray, matrix: str, config: ModelConfig) -> np.ndarray:
    """The way back from ``to_model_order``."""
    return split_pairs(rows, config.head_dim) if is_reordered(matrix, config) else rows
