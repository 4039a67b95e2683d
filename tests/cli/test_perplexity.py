"""Perplexity: the windows, the sum, and the command on the embedded model."""

import json
import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.cli.perplexity import exponential
from dllama.errors import ModelError
from dllama.likelihood import negative_log_likelihood, windows
from tests.cli.program import fails, succeeds


@given(st.data(), st.integers(0, 200), st.integers(1, 50), st.sampled_from([[], [-1]]))
def test_every_token_is_counted_once_with_the_history_before_it(data, n_tokens, context, head):
    stride = data.draw(st.integers(1, context))
    all_counted = []
    for fed, counted in windows(list(range(n_tokens)), head, context, stride):
        assert len(counted) <= len(fed) <= context
        assert fed[: len(head)] == head
        text = fed[len(head) :] + counted[-1:]
        assert text == list(range(text[0], counted[-1] + 1))
        if all_counted:
            assert counted[0] - text[0] == context - stride + (1 - len(head))
        all_counted += counted
    assert all_counted == list(range(1 - len(head), n_tokens))


def test_likelihood_is_that_of_the_softmax():
    random = np.random.default_rng(1)
    logits = random.normal(0, 10, (5, 40)).astype(np.float32)
    exponentials = np.exp(logits.astype(np.float64))
    probabilities = exponentials / exponentials.sum(axis=1, keepdims=True)
    expected = -np.log([probabilities[2, 7], probabilities[3, 0], probabilities[4, 39]]).sum()
    assert negative_log_likelihood(logits, [7, 0, 39]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_logits_that_are_no_distribution(value):
    logits = np.zeros((2, 5), np.float32)
    logits[1, 3] = value
    with pytest.raises(ModelError, match="not a distribution"):
        negative_log_likelihood(logits, [0, 0])


def test_a_model_that_is_wrong_beyond_measure():
    assert exponential(1.0) == math.e
    assert exponential(1e4) == math.inf


TEXT = "Tom has 3 apples. He buys 4 more apples at the market. How many apples does Tom have now?\n"


def test_the_command_on_the_embedded_model(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    values = json.loads(succeeds("perplexity", "--file", path, "--json"))
    assert 1 < values["perplexity"] < 200
    assert values["bytes"] == len(TEXT)
    per_byte = math.log(values["perplexity"]) * values["tokens"] / values["bytes"]
    assert math.log(values["perplexity_per_byte"]) == pytest.approx(per_byte)
    assert f"per token  {values['perplexity']:.4f}\n" in succeeds("perplexity", "--file", "-", stdin=TEXT.encode())


def test_scrambled_text_is_harder():
    scrambled = " ".join(sorted(TEXT.split(), key=lambda word: word[::-1]))
    plain, mixed = (
        json.loads(succeeds("perplexity", "--file", "-", "--json", stdin=text.encode())) for text in (TEXT, scrambled)
    )
    assert mixed["perplexity_per_byte"] > plain["perplexity_per_byte"]


def test_texts_without_a_token(tmp_path):
    assert fails("perplexity", "--file", "-").startswith("-: nothing to predict")
    assert fails("perplexity", "--file", tmp_path / "none").endswith(": no such file or folder")
