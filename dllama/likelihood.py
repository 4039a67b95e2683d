"""How likely a model finds a text: what is fed at a time, and what its logits say of it."""

from collections.abc import Iterator

import numpy as np

from dllama.errors import ModelError


def windows(tokens: list[int], head: list[int], context: int, stride: int) -> Iterator[tuple[list[int], list[int]]]:
    """For each window the tokens to feed, at most `context`, and the tokens to count.

    Feeding gives a row of logits for each token; the last len(counted) rows predict the counted tokens.
    head: what is put in front of each window, [bos] or nothing
    stride: from 1 to context
    """
    size = context + 1 - len(head)  # the last token of a window is predicted only
    done = 1 - len(head)
    for start in range(0, len(tokens), stride):
        end = min(start + size, len(tokens))
        if done < end:
            yield head + tokens[start : end - 1], tokens[done:end]
        if end == len(tokens):
            return
        done = end


def negative_log_likelihood(logits: np.ndarray, counted: list[int]) -> float:
    """-sum(ln p) of the counted tokens under the last rows of the logits, float32 [fed, vocab]; overwrites them.

    Raises ModelError where a row is no distribution: a NaN or +inf in it.
    """
    rows = logits[-len(counted) :]
    chosen = rows[np.arange(len(rows)), counted].astype(np.float64)
    largest = rows.max(axis=1)
    if not np.isfinite(largest).all():
        raise ModelError("the logits of the model are not a distribution: its weights are damaged")
    rows -= largest[:, None]
    np.exp(rows, out=rows)
    return float((np.log(rows.sum(axis=1, dtype=np.float64)) + largest - chosen).sum())
