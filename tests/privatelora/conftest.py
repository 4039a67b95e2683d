"""A live cloud that all tests of a module share, and edges by hand."""

from contextlib import ExitStack

import pytest

from dllama.privatelora.adapter import write_adapter
from tests.engine.models import SHAPES, random_model
from tests.privatelora.adapters import merged_logits, strong_halves
from tests.privatelora.fake_edge import FakeEdge
from tests.privatelora.nodes import CloudThread
from tests.privatelora.served import MAX_EDGES, STEP_TIMEOUT, TOKENS, serves


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """A cloud, and what a good edge needs: the model, the adapter's folder and its edge half, the logits of TOKENS."""
    folder = tmp_path_factory.mktemp("cloud")
    model = random_model(folder / "model.m", SHAPES["gqa"])
    pair = strong_halves(model.config, ("q", "v", "down"))
    write_adapter(folder, *pair)
    with CloudThread(folder / "model.m", max_edges=MAX_EDGES, step_timeout=STEP_TIMEOUT) as cloud:
        yield cloud, model, folder, pair[1], merged_logits(model, TOKENS, *pair)


@pytest.fixture
def cloud(served):
    yield served[0]
    serves(served)


@pytest.fixture
def fake(served, cloud):
    """Makes an edge by hand, with the adapter or without."""
    _, model, _, half, _ = served
    with ExitStack() as stack:
        yield lambda adapter=True: stack.enter_context(FakeEdge(cloud.address, model, half if adapter else None))
