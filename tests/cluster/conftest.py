"""What the tests of a running cluster share."""

import pytest

from dllama.cluster.slice_cache import SliceCache
from dllama.formats import FloatType
from tests.cluster import nodes
from tests.cluster.checkpoints import EXPERTS, SHAPES, VOCAB
from tests.cluster.processes import Pool
from tests.engine.models import random_model
from tests.forks import FORKS
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
    for name, shape in {**SHAPES, "experts": EXPERTS}.items():
        for weight_type in (FloatType.F32, FloatType.Q40):
            path = folder / f"{name}-{weight_type.name.lower()}.m"
            random_model(path, shape, weight_type).close()
            made[name, weight_type] = path, tokenizer
    return made


@pytest.fixture(autouse=True)
def _measure_little(monkeypatch):
    nodes.measure_little(monkeypatch.setattr)


@pytest.fixture
def notices():
    """What a `SliceCache` has to say."""
    return []


@pytest.fixture
def cache(tmp_path, notices):
    return SliceCache(tmp_path / "slices", notify=notices.append)


@pytest.fixture
def process(cache):
    """``process(run, *args)``: another process that runs ``run(pipe, folder, *args)`` on the same cache; it and the
    other end of the pipe."""
    started = []

    def start(run, *args):
        ours, theirs = FORKS.Pipe()
        started.append(FORKS.Process(target=run, args=(theirs, cache.folder, *args), daemon=True))
        started[-1].start()
        theirs.close()
        return started[-1], ours

    yield start
    for one in started:
        one.kill()
        one.join()
