"""Settings for every test."""

from hypothesis import HealthCheck, settings

# Machines that run the tests may be slow or busy: how long an example takes says nothing about the code.
settings.register_profile("dllama", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("dllama")
