"""Settings for every test."""

import gc
import signal

from hypothesis import HealthCheck, settings

# Machines that run the tests may be slow or busy: how long an example takes says nothing about the code.
settings.register_profile("dllama", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dllama")

# A shell's background job is started with SIGINT ignored, and its children inherit that; the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_finish() -> None:
    """What the imports have left stays to the end: with torch and the tests themselves a million objects, which every
    full collection would go through again for half a second, and some tests ask for several of them."""
    gc.collect()
    gc.freeze()
