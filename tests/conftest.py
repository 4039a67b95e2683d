"""Settings for every test."""

import signal

from hypothesis import HealthCheck, settings

# Machines that run the tests may be slow or busy: how long an example takes says nothing about the code.
settings.register_profile("dllama", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dllama")

# A shell's background job is started with SIGINT ignored, and its children inherit that; the tests of Ctrl-C need it.
signal.signal(signal.SIGINT, signal.default_int_handler)
