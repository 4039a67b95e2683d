"""The headers of what is said at a stop, for compiled code: it puts the layer and the product behind them."""

from __future__ import annotations

import numpy as np

from dllama.cluster import wire
from dllama.kernels.headers import Prefix


class Headers:
    """What a step's `wire.Low` and `wire.Answer` begin with."""

    def __init__(self):
        self.low, self.answer = Prefix(), Prefix()

    def begin(self, record: np.void | np.ndarray, step: int) -> None:
        """For this step on; their bytes go into the record's ``low_bytes`` and ``answer_bytes``."""
        record["low_bytes"] = self.low.write(wire.unchecked(wire.Low(step, 0, 0))[:-2])
        record["answer_bytes"] = self.answer.write(wire.unchecked(wire.Answer(step, 0, 0))[:-2])
