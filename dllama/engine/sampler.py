"""From the logits of one position to the next token id.

The steps, in this order: repetition penalty, temperature, top-k, min-p, top-p, draw. Each filter sees the
distribution that the one before left, renormalised, as the logits warpers of Hugging Face transformers do.
"""

import math
import secrets
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dllama.engine.candidates import MAX_RECENT, MIN_TEMPERATURE, Candidates, Reduction, reduce
from dllama.engine.filters import scores, top_k, top_p, weights
from dllama.errors import ModelError

# More than the sums of float64 that a mass is made of differ with the order of their terms. Where equal tokens reach
# top_p to the last bit, rounding must not decide whether one more is kept.
SUM_ERROR = 1e-12


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
        _require(
            1 <= self.repetition_window <= MAX_RECENT, "repetition_window", self.repetition_window, f"1 to {MAX_RECENT}"
        )
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
        """The next token id, from all the logits.

        logits: float32 [vocab_size], left as they are; -inf forbids a token
        history: the token ids so far, prompt included, oldest first

        Raises ModelError where the logits are no distribution: NaN, +inf, or all of them -inf.
        """
        if logits.shape != (self.vocab_size,):
            raise ValueError(f"logits have shape {logits.shape}, not ({self.vocab_size},)")
        return self.choose(reduce(logits, 0, self.reduction(history)))

    def reduction(self, history: Sequence[int]) -> Reduction:
        """What a node may leave out of its logits after this history, for `choose` to take the same token."""
        settings = self.settings
        penalised = settings.repetition_penalty != 1
        return Reduction(
            settings.temperature,
            settings.top_k if settings.top_k < self.vocab_size else 0,
            settings.min_p,
            (1 - settings.top_p) / self.vocab_size,
            settings.repetition_penalty,
            tuple(history[-settings.repetition_window :]) if penalised else (),
        )

    def choose(self, candidates: Candidates) -> int:
        """The next token id, from the merged candidates of the whole vocabulary under `reduction`.

        Raises ModelError where the logits are no distribution: NaN, +inf, or all of them -inf.
        """
        best = int(candidates.logits.argmax())  # the lowest id of equals; a NaN counts as the largest
        if not math.isfinite(candidates.logits[best]):
            raise ModelError(
                f"the logits of the model are not a distribution: the largest is {candidates.logits[best]}"
            )
        if self.settings.temperature < MIN_TEMPERATURE:
            return int(candidates.ids[best])

        ids, probabilities = likely(candidates, self.settings)
        cumulative = np.cumsum(probabilities, dtype=np.float64)
        drawn = np.searchsorted(cumulative, self._random.random() * cumulative[-1], side="right")
        return int(ids[min(drawn, len(ids) - 1)])  # the product may round up to the last sum


def likely(candidates: Candidates, settings: SamplerSettings) -> tuple[np.ndarray, np.ndarray]:
    """The token ids that may be drawn, int64 [n], and their probabilities relative to each other, float32 [n].

    The largest of the candidates' logits is finite; settings.temperature is not 0.
    """
    ids, relative = candidates.ids, scores(candidates.logits, settings.temperature)
    if 0 < settings.top_k < len(ids):
        kept = top_k(candidates.logits, settings.top_k)
        ids, relative = ids[kept], relative[kept]
    if settings.min_p > 0:
        kept = np.flatnonzero(relative >= math.log(settings.min_p))
        ids, relative = ids[kept], relative[kept]
    probabilities = np.exp(relative)
    if settings.top_p < 1:
        if candidates.mass is None:
            kept = top_p(probabilities, settings.top_p)
        else:
            total = candidates.mass * (1 - SUM_ERROR)
            kept = top_p(weights(candidates.logits, settings.temperature), settings.top_p, total)
        ids, probabilities = ids[kept], probabilities[kept]
    return ids, probabilities
