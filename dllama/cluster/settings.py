"""How a root reaches its workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dllama.cluster.key import ClusterKey

DEFAULT_PORT = 9998
STEP_TIMEOUT = 10.0


@dataclass(frozen=True)
class ClusterSettings:
    """The workers of a cluster and how to deal with them.

    workers: addresses, "host:port"; key: the cluster's, None for links in the clear that anybody can use; ratios:
    shares of root and workers, None for the planner's own; connect_timeout: seconds until a worker that cannot be
    reached is given up; step_timeout: seconds without an answer after which a node counts as lost
    """

    workers: tuple[str, ...]
    key: ClusterKey | None
    ratios: tuple[float, ...] | None = None
    connect_timeout: float = 5.0
    step_timeout: float = STEP_TIMEOUT
