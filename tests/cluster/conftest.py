"""What the tests of a running cluster share."""

import pytest

from dllama.formats import FloatType
from tests.cluster.checkpoints import SHAPES, VOCAB
from tests.cluster.processes import Pool
from tests.engine.models import random_model
from tests.tokenizer.models import train


@pytest.fixture(scope="session")
def _pool(tmp_path_factory):
    pool = Pool(tmp_path_factory.mktemp("slices"))
    yield pool
    pool.close()


@pytest.fixture
def workers(_pool):
    """``workers(count)``: live workers that serve nobody; ``workers(count, **options)``: such of this test alone."""
    yield _pool
    _pool.end_own()


@pytest.fixture(scope="session")
def models(tmp_path_factory):
    """Paths of random models and of their tokenizer, by shape and weight type: ``models["gqa", FloatType.Q40]``."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = train(folder / "tokenizer.model", vocab_size=VOCAB)
    made = {}
    for name, shape in SHAPES.items():
        for weight_type in (FloatType.F32, FloatType.Q40):
            path = folder / f"{name}-{weight_type.name.lower()}.m"
            random_model(path, shape, weight_type).close()
            made[name, weight_type] = path, tokenizer
    return made
