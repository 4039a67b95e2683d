"""What a sampler does to the logits or probabilities of one position, as functions of arrays.

Where a number of the likeliest is kept, the lowest of equals stay.
"""

from collections.abc import Sequence

import numpy as np


def penalise(logits: np.ndarray, recent: Sequence[int], penalty: float) -> np.ndarray:
    """A copy of the logits [vocab] in which each id of `recent` is weakened once, however often it occurs.

    CTRL's penalty (Keskar et al. 2019, section 4.1) in the form that Hugging Face and llama.cpp share: a positive
    logit is divided by the penalty and a negative one multiplied, so that both become less likely.
    """
    ids = np.unique(np.asarray(recent, dtype=np.int64))
    logits = logits.copy()
    seen = logits[ids]
    logits[ids] = np.where(seen > 0, seen / penalty, seen * penalty)
    return logits


def scores(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Logarithms of the probabilities relative to the likeliest's, float32 [n]; the largest is 0.

    logits: float32 [n], the largest of them finite
    """
    with np.errstate(over="ignore"):  # far below the largest, at a low temperature: -inf, probability 0
        return (logits - logits.max()) / np.float32(temperature)


def weights(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Probabilities relative to the likeliest's, float64 [n], for sums that come out the same however they are split.

    logits: float32 [n], the largest of them finite
    """
    relative = np.subtract(logits, logits.max(), dtype=np.float64)
    relative /= temperature
    return np.exp(relative, out=relative)


def top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest logits, ascending, int64 [k]; of equals the lowest stay. 0 < k < len(logits)."""
    rest = logits
    whole = len(logits) // (4 * k) * (4 * k)
    if whole:
        # Dealt into 4k groups, k of the groups' maxima reach the k-th largest maximum; so k logits do, and few more.
        maxima = logits[:whole].reshape(-1, 4 * k).max(axis=0)
        rest = logits[logits >= np.partition(maxima, -k)[-k]]
    return _reaching(logits, np.partition(rest, -k)[-k], k)


def top_p(probabilities: np.ndarray, p: float, total: float | None = None) -> np.ndarray:
    """Indices of the smallest set of largest probabilities that reaches p of the total, ascending. 0 < p < 1.

    total: what they are parts of, where some are left out that are none of this set; their sum if not given

    Of n tokens, those each below 1/n of what the sum has to spare hold less than that together, so the rest reach p
    without them and only the rest is sorted: a few hundred of 128,000 for the distributions that models give.
    """
    whole = probabilities.sum(dtype=np.float64)
    target = p * (whole if total is None else total)
    rest = probabilities[probabilities >= (whole - target) / len(probabilities)]
    descending = np.sort(rest)[::-1]
    count = 1 + int(np.searchsorted(np.cumsum(descending, dtype=np.float64), target))
    count = min(count, len(rest))  # rounding may leave the last sum just short
    return _reaching(probabilities, descending[count - 1], count)


def _reaching(values: np.ndarray, threshold: np.floating, count: int) -> np.ndarray:
    """Indices of the values that reach the threshold, the count-th largest value; of those equal to it the first."""
    indices = np.flatnonzero(values >= threshold)
    surplus = len(indices) - count
    if surplus:
        indices = np.setdiff1d(indices, np.flatnonzero(values == threshold)[-surplus:], assume_unique=True)
    return indices
