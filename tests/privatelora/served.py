"""What the shared cloud of a module has to be like after each test."""

import gc

from dllama.errors import ClusterError
from tests.cluster.processes import eventually
from tests.privatelora.nodes import edge, run

MAX_EDGES = 3
STEP_TIMEOUT = 2.0
TOKENS = [5, 3, 60, 31, 7]


def serves(served) -> None:
    """A good edge gets what it should, and nothing is left of those before it."""
    cloud, model, folder, _, expected = served
    assert cloud.alive, cloud.lines
    found = []

    def has_room() -> bool:
        try:
            with edge(model, cloud.address, adapter=folder) as engine:
                found[:] = run(engine, TOKENS)
        except ClusterError as error:
            assert "this cloud is busy" in str(error), error  # with those that it has not seen go yet
        return bool(found)

    eventually(has_room)
    assert abs(found - expected).max() < 1e-4 * abs(expected).max()
    is_free(cloud)


def is_free(cloud) -> None:
    """Nobody is there any more, and all that they had is freed."""
    eventually(lambda: not cloud.backend.adapters, lambda: f"adapters {cloud.backend.adapters}")
    eventually(lambda: not gc.collect() and not cloud.backend.caches, lambda: f"{len(cloud.backend.caches)} caches")
