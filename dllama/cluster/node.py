"""What the plan has to know of a device."""

import math
from dataclasses import dataclass

from dllama.errors import PlanError


@dataclass(frozen=True)
class NodeSpec:
    """One device. Raises PlanError for figures that no device has."""

    name: str
    read_speed: float | None = None  # bytes of weights that it works through in a second; None: not measured
    memory: int | None = None  # bytes free for the model; None: not known, taken for enough
    threads: int = 1
    bandwidth: float = 125e6  # bytes a second that its link carries, each way at once; 1 Gbit/s
    latency: float = 0.2e-3  # seconds that a small message is on its way, without the work at either end

    def __post_init__(self):
        if not self.name:
            raise PlanError("a node without a name")
        for quantity, value, possible in (
            ("read speed", self.read_speed, self.read_speed is None or 0 < self.read_speed < math.inf),
            ("memory", self.memory, self.memory is None or self.memory >= 0),
            ("thread count", self.threads, self.threads >= 1),
            ("bandwidth", self.bandwidth, 0 < self.bandwidth < math.inf),
            ("latency", self.latency, 0 <= self.latency < math.inf),
        ):
            if not possible:
                raise PlanError(f"node {self.name}: a {quantity} of {value} is impossible")
