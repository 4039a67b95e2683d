"""What torch's backend is held against."""

import pytest

from dllama.kernels import tags
from dllama.kernels.team import Team
from dllama.privatelora.backends.cpu import CpuBackend


@pytest.fixture(scope="module")
def team():
    team = Team(2)
    yield team
    team.close()


@pytest.fixture
def on_cpu(team):
    """Opens a model with the CPU's backend, in F32."""
    return lambda model: CpuBackend(model, team, tags.F32, tags.F32)
