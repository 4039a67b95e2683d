"""Runs tokens through an engine."""

import numpy as np

from dllama.engine.interface import Row


def run(engine, tokens, pieces, sequence=None) -> np.ndarray:
    """Logits of all tokens, which are run in ``pieces`` of so many rows each."""
    sequence = sequence or engine.sequence()
    out, start = [], 0
    for n in pieces:
        rows = [Row(sequence, start + i, token) for i, token in enumerate(tokens[start : start + n])]
        out.append(engine.forward(rows).copy())
        start += n
    assert start == len(tokens)
    return np.concatenate(out)
