"""The embedded model: a golden text, and what quantisation costs it.

`python -m tests.engine.record_golden` records both for a new model; bench/quality.py measures on longer texts.
"""

import json

import pytest

from tests.engine.golden import EXACT, GOLDEN, generate, perplexity


@pytest.fixture(scope="module")
def golden():
    return json.loads(GOLDEN.read_text(encoding="utf-8"))


def test_the_golden_text(golden):
    """Greedy, and so the same with all kernels."""
    found = generate(golden["prompt"], golden["steps"])
    assert found["text"] == golden["text"]
    assert found["token_ids"] == golden["token_ids"]


def test_perplexity_stays_within_3_percent_of_the_f32_form(golden):
    """Weights Q40, activations Q80, cache F16, against the trained checkpoint in float32 throughout."""
    assert abs(perplexity() / golden["f32_perplexity"] - 1) < 0.03


def test_rounding_activations_and_cache_costs_next_to_nothing():
    exact = perplexity(**EXACT)
    for rounded in (perplexity(), perplexity(kv_float_type="q80")):
        assert abs(rounded / exact - 1) < 0.01
