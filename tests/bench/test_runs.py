"""A run of dllama on a tiny model, in a process of its own, as every measure starts it."""

import pytest

from bench.runs import Job, Weights, run
from bench.synth import write


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    weights = Weights("tiny", folder / "tiny.m", folder / "tiny.t", folder / "none.gguf")
    write("tiny", weights.model, tokenizer=weights.tokenizer)
    return weights


def test_run_reports_every_repeat_and_token(weights):
    found = run("dllama", Job(threads=1, context=64, prompt=20, tokens=5, repeats=2), weights)
    assert found.program == "dllama"
    assert found.kernels
    assert len(found.prefill_ms) == 2
    assert len(found.token_ms) == 2 * 5
    assert min(found.prefill_ms + found.token_ms + [found.first_token_ms, found.peak_bytes]) > 0


def test_a_failing_run_gives_its_reason(weights):
    with pytest.raises(SystemExit, match="no such kernels"):
        run("dllama", Job(threads=1, context=64), weights, kernels="vacuum-tubes")
