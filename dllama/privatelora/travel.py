"""Values between edge and cloud as they travel: rows of finite floats as Q80, F16 or F32."""

from __future__ import annotations

import numpy as np

from dllama.engine import rows
from dllama.formats import FloatType
from dllama.kernels.answer import LIMITS


class Rows(rows.Rows):
    """As they are, but ValueError also for a value that is not finite, on both sides: Q80 would hide it."""

    def __init__(self, form: FloatType, width: int):
        super().__init__(form, width)
        self._largest = np.float32(LIMITS.get(self.tag, np.finfo(np.float32).max))

    def encode(self, x: np.ndarray) -> np.ndarray:
        if not np.isfinite(x).all():
            raise ValueError("a value that is infinite or no number")
        return super().encode(x)

    def decode(self, payload, rows: int) -> np.ndarray:
        x = super().decode(payload, rows)
        if not (abs(x) <= self._largest).all():
            raise ValueError("a value that is infinite or no number")
        return x
