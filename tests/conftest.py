"""Settings for every test."""

import gc
import os
import signal
from itertools import count

import pytest
from hypothesis import HealthCheck, settings

# Machines that run the tests may be slow or busy: how long an example takes says nothing about the code.
settings.register_profile("dllama", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dllama")

# The tests' models are so small that a second thread of torch or BLAS costs more than it brings, and where something
# else runs on the machine the threads wait for each other, up to thirty times as long. Read when these are imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell's background job is started with SIGINT ignored, and its children inherit that; the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What the imports have left stays to the end: with torch and the tests themselves a million objects, which every
    full collection would go through again for half a second, and some tests ask for several of them."""
    gc.collect()
    gc.freeze()


_STARTS = count()


@pytest.fixture(autouse=True)
def _no_earlier_starts(tmp_path_factory):
    """Each test finds a root that has measured no nodes before. It is the first fixture of all: with the fixture
    `monkeypatch` it would have what tests patch last until the others have ended."""
    folder = tmp_path_factory.getbasetemp() / f"cache-{next(_STARTS)}"  # not there until something is written
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dllama.cluster.earlier.cache_folder", lambda: folder)
        yield
