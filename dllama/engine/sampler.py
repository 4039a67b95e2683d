"""From the logits of one position to the next token id.

The steps, in this order: repetition penalty, temperature, top-k, min-p, top-p, draw. Each filter sees the
distribution that the one before left, renormalised, as the logits warpers of Hugging Face transformers do.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dllama.errors import ModelError

# Below this temperature, logits that differ in their last float32 bit are already e^-1 apart: greedy, to rounding.
MIN_TEMPERATURE = 1e-6


@dataclass(frozen=True)
class SamplerSettings:
    """How to choose a token. The values that switch a step off are given in brackets.

    temperature: divides the logits; 0 chooses the likeliest token, the lowest id of equals (1)
    top_k: keeps the k likeliest tokens, of equals the lowest ids (0)
    min_p: keeps tokens at least min_p times as likely as the likeliest one (0)
    top_p: keeps the smallest set of likeliest tokens whose probabilities reach top_p (1)
    repetition_penalty: weakens the tokens among the last repetition_window ones, prompt included (1)
    seed: the same seed and settings give the same text; None takes a new seed

    Raises ValueError, with a message for the user, for a value that makes no sense.
    """

    temperature: float = 0.8
    top_k: int = 0
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64
    seed: int | None = None

    def __post_init__(self):
        _require(0 <= self.temperature < math.inf, "temperature", self.temperature, "0 or more")
        _require(self.top_k >= 0, "top_k", self.top_k, "0 (off) or more")
        _require(0 < self.top_p <= 1, "top_p", self.top_p, "above 0 and at most 1 (off)")
        _require(0 <= self.min_p <= 1, "min_p", self.min_p, "from 0 (off) to 1")
        _require(0 < self.repetition_penalty < math.inf, "repetition_penalty", self.repetition_penalty, "above 0")
        _require(self.repetition_window >= 1, "repetition_window", self.repetition_window, "1 or more")
        _require(self.seed is None or self.seed >= 0, "seed", self.seed, "0 or more")


def _require(holds: bool, name: str, value, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}: it must be {expected}")


class Sampler:
    """Draws token ids under fixed settings; holds the random state of one sequence.

    seed: the seed in use, the settings' own or a new one.
    """

    def __init__(self, settings: SamplerSettings, vocab_size: int):
        self.settings = settings
        self.vocab_size = vocab_size
        self.seed = secrets.randbits(32) if settings.seed is None else settings.seed
        self._random = np.random.Generator(np.random.PCG64(self.seed))

    def sample(self, logits: np.ndarray, history: Sequence[int]) -> int:
        """The next token id.

        logits: float32 [vocab_size], left as they are; -inf forbids a token
        history: the token ids so far, prompt included, oldest first

        Raises ModelError where the logits are no distribution: NaN, +inf, or all of them -inf.
        """
        settings = self.settings
        if logits.shape != (self.vocab_size,):
            raise ValueError(f"logits have shape {logits.shape}, not ({self.vocab_size},)")
        if settings.repetition_penalty != 1:
            logits = penalise(logits, history[-settings.repetition_window :], settings.repetition_penalty)

        best = int(logits.argmax())  # the lowest id of equals; a NaN counts as the largest
        if not math.isfinite(logits[best]):
            raise ModelError(f"the logits of the model are not a distribution: the largest is {logits[best]}")
        if settings.temperature < MIN_TEMPERATURE:
            return best

        ids, probabilities = candidates(logits, settings)
        cumulative = np.cumsum(probabilities, dtype=np.float64)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(drawn, len(ids) - 1)])  # the product may round up to the last sum


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


def candidates(logits: np.ndarray, settings: SamplerSettings) -> tuple[np.ndarray, np.ndarray]:
    """The token ids that may be drawn, int64 [n], and their probabilities relative to each other, float32 [n].

    logits: float32 [vocab], the largest of them finite; settings.temperature is not 0
    """
    with np.errstate(over="ignore"):  # far below the largest, at a low temperature: -inf, probability 0
        scores = (logits - logits.max()) / np.float32(settings.temperature)  # the largest is 0
    ids = np.arange(len(scores))
    if 0 < settings.top_k < len(scores):
        ids = top_k(scores, settings.top_k)
        scores = scores[ids]
    if settings.min_p > 0:
        kept = np.flatnonzero(scores >= math.log(settings.min_p))
        ids, scores = ids[kept], scores[kept]
    probabilities = np.exp(scores)
    if settings.top_p < 1:
        kept = top_p(probabilities, settings.top_p)
        ids, probabilities = ids[kept], probabilities[kept]
    return ids, probabilities


def top_k(scores: np.ndarray, k: int) -> np.ndarray:
    """Indices of the k largest scores, ascending, int64 [k]; of equals the lowest stay. 0 < k < len(scores)."""
    return _reaching(scores, np.partition(scores, -k)[-k], k)


def top_p(probabilities: np.ndarray, p: float) -> np.ndarray:
    """Indices of the smallest set of largest probabilities that reaches p of their sum, ascending. 0 < p < 1.

    Of n tokens, those each below (1 - p) / n of the sum hold less than 1 - p of it together, so the rest reach p
    without them and only the rest is sorted: a few hundred of 128,000 for the distributions that models give.
    """
    total = probabilities.sum(dtype=np.float64)
    rest = probabilities[probabilities >= total * (1 - p) / len(probabilities)]
    descending = np.sort(rest)[::-1]
    count = 1 + int(np.searchsorted(np.cumsum(descending, dtype=np.float64), p * total))
    count = min(count, len(rest))  # rounding may leave the last sum just short
    return _reaching(probabilities, descending[count - 1], count)


def _reaching(values: np.ndarray, threshold: np.float32, count: int) -> np.ndarray:
    """Indices of the values that reach the threshold, the count-th largest value; of those equal to it the first."""
    indices = np.flatnonzero(values >= threshold)
    surplus = len(indices) - count
    if surplus:
        indices = np.setdiff1d(indices, np.flatnonzero(values == threshold)[-surplus:], assume_unique=True)
    return indices
