"""The sampler against exact distributions and against definitions written out in plain Python."""

import math
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.engine.candidates import reduce
from dllama.engine.sampler import Sampler, SamplerSettings, likely
from dllama.errors import ModelError

# Few distinct values, so that equal logits are common.
logit_values = st.sampled_from([-4.0, -1.5, 0.0, 0.25, 1.0, 2.5, 6.0]) | st.floats(-30, 30, width=32)
logit_lists = st.lists(logit_values, min_size=1)

ALL_STEPS_OFF = {"temperature": 1.0, "top_p": 1.0}


def draw(logits, count=1, history=(), **settings) -> list[int]:
    logits = np.array(logits, np.float32)
    sampler = Sampler(SamplerSettings(**settings), len(logits))
    return [sampler.sample(logits, history) for _ in range(count)]


def softmax(logits) -> np.ndarray:
    exponentials = np.exp(np.array(logits, np.float64) - np.max(logits))
    return exponentials / exponentials.sum()


def assert_distributed(drawn: list[int], expected: np.ndarray) -> None:
    """Pearson's chi-square at the 99.9 % point (Wilson-Hilferty's formula); tokens of probability 0 never occur."""
    possible = np.flatnonzero(expected)
    counts = Counter(drawn)
    assert set(counts) <= set(possible.tolist())
    observed = np.array([counts[i] for i in possible])
    wanted = expected[possible] * len(drawn)
    freedom = len(possible) - 1
    limit = freedom * (1 - 2 / (9 * freedom) + 3.09 * math.sqrt(2 / (9 * freedom))) ** 3
    assert ((observed - wanted) ** 2 / wanted).sum() < limit


LOGITS = [2.0, 1.0, 0.5, 0.0, -1.0, -2.0, 1.5, 0.75]


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_softmax_at_every_temperature(temperature):
    drawn = draw(LOGITS, 20_000, temperature=temperature, top_p=1.0, seed=1)
    assert_distributed(drawn, softmax(np.array(LOGITS) / temperature))


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({"top_k": 3}, [0, 6, 1]),
        ({"min_p": 0.3}, [0, 6, 1]),  # e^-1 = 0.37 is kept, e^-1.25 = 0.29 is not
        ({"top_p": 0.6}, [0, 6, 1]),  # 0.36, 0.58, then 0.71 reaches it
        ({"top_k": 4, "top_p": 0.6}, [0, 6]),  # renormalised over 4 tokens: 0.42, then 0.67 reaches it
    ],
)
def test_filters_keep_the_likeliest_and_their_proportions(settings, kept):
    expected = np.zeros(len(LOGITS))
    expected[kept] = softmax(np.array(LOGITS)[kept])
    assert_distributed(draw(LOGITS, 20_000, seed=2, **(ALL_STEPS_OFF | settings)), expected)


@given(logit_lists, st.integers(0, 2**31))
def test_greedy_takes_the_lowest_id_of_the_largest(logits, seed):
    logits = np.array(logits, np.float32)
    expected = logits.tolist().index(logits.max())
    assert draw(logits, temperature=0.0, seed=seed) == [expected]
    assert draw(logits, temperature=1e-9, seed=seed) == [expected]
    assert draw(logits, temperature=5.0, top_k=1, top_p=1.0, seed=seed) == [expected]


@given(
    logit_lists,
    st.floats(0.01, 10),
    st.integers(0, 20),
    st.floats(0.05, 1),
    st.floats(0, 1),
    st.floats(0.5, 2),
    st.lists(st.integers(0, 1000), max_size=100),
    st.integers(0, 2**63),
)
def test_any_settings_draw_a_candidate_and_a_seed_repeats_it(logits, temperature, k, p, m, penalty, history, seed):
    settings = SamplerSettings(temperature, k, p, m, penalty, seed=seed)
    logits = np.array(logits, np.float32)
    before = logits.copy()
    history = [token % len(logits) for token in history]
    sampler = Sampler(settings, len(logits))
    drawn = [sampler.sample(logits, history) for _ in range(5)]
    again = Sampler(settings, len(logits))
    assert [again.sample(logits, history) for _ in range(5)] == drawn
    ids, probabilities = likely(reduce(logits, 0, sampler.reduction(history)), settings)
    assert set(drawn) <= set(ids[probabilities > 0].tolist())
    assert k == 0 or len(ids) <= k
    assert np.array_equal(logits, before)


@given(logit_lists, st.floats(0.01, 10), st.floats(0.01, 0.99))
def test_top_p_alone_keeps_the_smallest_head_of_a_sort_that_reaches_p(logits, temperature, p):
    settings = SamplerSettings(temperature, top_p=p)
    logits = np.array(logits, np.float32)
    ids, _ = likely(reduce(logits, 0, Sampler(settings, len(logits)).reduction([])), settings)
    shares = np.exp((logits.astype(np.float64) - logits.max()) / temperature)
    order = sorted(range(len(logits)), key=lambda i: -shares[i])
    assert ids.tolist() == sorted(order[: len(ids)])
    assert shares[ids].sum() >= p * shares.sum() * (1 - 1e-9)
    assert shares[order[: len(ids) - 1]].sum() < p * shares.sum() * (1 + 1e-9)


def test_a_new_seed_is_taken_and_told():
    logits = np.zeros(1000, np.float32)
    first = Sampler(SamplerSettings(), 1000)
    repeat = Sampler(SamplerSettings(seed=first.seed), 1000)
    other = Sampler(SamplerSettings(), 1000)
    texts = [[sampler.sample(logits, []) for _ in range(20)] for sampler in (first, repeat, other)]
    assert texts[0] == texts[1] != texts[2]


def test_penalty_sees_the_window_only():
    settings = {"temperature": 0.0, "repetition_penalty": 2.0, "repetition_window": 2}
    assert draw([3, 2], history=[0, 1, 1], **settings) == [0]
    assert draw([3, 2], history=[1, 0, 0], **settings) == [1]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("bad", [[1, math.nan, 2], [1, math.inf, 2], [-math.inf] * 3])
def test_logits_that_are_no_distribution_are_an_error(bad, temperature):
    with pytest.raises(ModelError, match="not a distribution"):
        draw(bad, temperature=temperature)


def test_forbidden_tokens_are_never_drawn():
    drawn = draw([0, -math.inf, 0, -math.inf], 2000, seed=3, **ALL_STEPS_OFF)
    assert_distributed(drawn, np.array([0.5, 0, 0.5, 0]))


def test_a_top_k_of_the_whole_vocabulary_is_off():
    assert Sampler(SamplerSettings(top_k=99), 100).reduction([]).top_k == 99
    assert Sampler(SamplerSettings(top_k=10**12), 100).reduction([]) == Sampler(SamplerSettings(), 100).reduction([])


def test_logits_of_another_vocabulary_are_refused():
    with pytest.raises(ValueError, match="shape"):
        Sampler(SamplerSettings(), 3).sample(np.zeros(4, np.float32), [])


@pytest.mark.parametrize(
    "setting",
    [
        {"temperature": -0.1},
        {"temperature": math.nan},
        {"temperature": math.inf},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.01},
        {"min_p": -0.01},
        {"min_p": 1.5},
        {"repetition_penalty": 0.0},
        {"repetition_penalty": math.nan},
        {"repetition_window": 0},
        {"repetition_window": 4097},
        {"seed": -1},
    ],
)
def test_settings_without_sense_are_refused_by_name(setting):
    with pytest.raises(ValueError, match=next(iter(setting))):
        SamplerSettings(**setting)
