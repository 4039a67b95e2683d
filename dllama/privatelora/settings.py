"""How an edge reaches its cloud, and what it keeps to itself."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dllama.cluster.settings import STEP_TIMEOUT

if TYPE_CHECKING:
    from dllama.cluster.key import ClusterKey

BUSY = "this cloud is busy"
"""How the refusal of an edge begins that may come again later."""
RECONNECT_TIMEOUT = 120.0


@dataclass(frozen=True)
class EdgeSettings:
    """The cloud of an edge and how to deal with it.

    cloud: its address, "host:port"; key: the cluster's, None for links in the clear; adapter: the edge's half, None to
    run the base model; edge_layers: how many of the first and of the last layers the edge works itself; form: what
    travels is rounded to, "q80", "f16" or "f32"; noise: standard deviation of what is added to the values that enter
    the cloud, as a share of their own root mean square; connect_timeout, step_timeout: as in `ClusterSettings`;
    reconnect_timeout: seconds to try to reach a cloud again that was lost; one that is there and loads its model is
    waited for as long as it takes
    """

    cloud: str
    key: ClusterKey | None
    adapter: str | os.PathLike | None = None
    edge_layers: tuple[int, int] = (0, 0)
    form: str = "q80"
    noise: float = 0.0
    connect_timeout: float = 5.0
    step_timeout: float = STEP_TIMEOUT
    reconnect_timeout: float = RECONNECT_TIMEOUT
