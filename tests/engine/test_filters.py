"""The sampler's filters against definitions written out in plain Python."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.engine.filters import penalise, top_k, top_p, weights

# Few distinct values, so that equal logits are common.
logit_values = st.sampled_from([-4.0, -1.5, 0.0, 0.25, 1.0, 2.5, 6.0]) | st.floats(-30, 30, width=32)
logit_lists = st.lists(logit_values, min_size=1)


@given(logit_lists, st.integers(1, 200))
def test_top_k_is_the_head_of_a_stable_sort(logits, k):
    scores = np.array(logits, np.float32)
    if k < len(scores):
        assert top_k(scores, k).tolist() == sorted(sorted(range(len(scores)), key=lambda i: -scores[i])[:k])


@given(logit_lists, st.floats(0.01, 0.99))
def test_top_p_is_the_smallest_head_of_a_sort_that_reaches_p(logits, p):
    probabilities = np.exp(np.array(logits, np.float32))
    kept = top_p(probabilities, p).tolist()
    order = sorted(range(len(logits)), key=lambda i: -probabilities[i])
    assert kept == sorted(order[: len(kept)])
    mass = probabilities.astype(np.float64)
    total = mass.sum()
    assert mass[kept].sum() >= p * total * (1 - 1e-9)
    assert mass[order[: len(kept) - 1]].sum() < p * total * (1 + 1e-9)


@pytest.mark.parametrize("k", [1, 7, 40, 300, 999])
@pytest.mark.parametrize("distinct", [3, 50, 10_000])
def test_top_k_of_many(k, distinct):
    logits = np.random.default_rng(k).integers(0, distinct, 1000).astype(np.float32)
    logits[::3] = -np.inf
    assert top_k(logits, k).tolist() == np.sort(np.argsort(-logits, kind="stable")[:k]).tolist()


@given(st.integers(0, 2**32), st.floats(0.1, 0.999), st.data())
def test_top_p_of_a_total_does_not_need_the_tokens_that_it_leaves_out(seed, p, data):
    probabilities = weights(np.random.default_rng(seed).normal(0, 3, 500).astype(np.float32), 1.0)
    total = float(probabilities.sum()) * (1 - 1e-12)
    expected = top_p(probabilities, p, total)
    spare = np.setdiff1d(np.arange(500), expected)
    left_out = data.draw(st.sets(st.sampled_from(spare.tolist()))) if len(spare) else ()
    held = np.setdiff1d(np.arange(500), sorted(left_out))
    assert held[top_p(probabilities[held], p, total)].tolist() == expected.tolist()


def test_penalty_divides_positive_and_multiplies_negative_logits_once():
    logits = np.array([2, -2, 3, 0], np.float32)
    assert penalise(logits, [0, 1, 1, 0, 3], 2.0).tolist() == [1, -4, 3, 0]
    assert logits.tolist() == [2, -2, 3, 0]
