"""What is said of a model that the nodes do not hold together."""

import pytest

from dllama.cli.options import open_model_file
from dllama.cluster.node import NodeSpec
from dllama.doctor.finding import State
from dllama.doctor.workers import plan_findings


@pytest.mark.parametrize(
    ("nodes", "memory", "context", "advice"),
    [
        (3, 10**6, 64, "more nodes, more memory"),
        (99, 10**9, 64, "leave out workers"),
        (1, 10**9, 10**6, "a shorter context"),
    ],
)
def test_a_model_that_does_not_fit(nodes, memory, context, advice):
    specs = [NodeSpec(f"pi{i}", 1e9, memory, 4) for i in range(nodes)]
    with open_model_file(None) as model:
        (finding,) = plan_findings(model, context, specs)
    assert (finding.node, finding.check, finding.state) == ("pi0", "model", State.WRONG)
    assert finding.advice.startswith(advice)
