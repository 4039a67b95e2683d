"""Requests side by side: the same answers as one by one, and what they share is run once."""

import numpy as np
import pytest

from dllama import Llama, SamplerSettings
from dllama.engine.candidates import Reduction
from dllama.engine.sampler import Sampler
from dllama.engine.workspace import MAX_ROWS
from dllama.eval.lanes import run
from dllama.eval.requests import Generation, Scoring
from dllama.likelihood import negative_log_likelihood
from dllama.llama import LOGIT_ROWS

GREEDY = SamplerSettings(temperature=0)
QUESTION = "Question: Tom has 3 apples and buys 4 more. How many apples does he have?\nAnswer:"


@pytest.fixture(scope="module")
def llama():
    with Llama(buffer_float_type="f32", kv_float_type="f32", nthreads=1) as llama:
        yield llama


class Counting:
    """An engine that counts the rows it runs."""

    def __init__(self, engine):
        self._engine, self.rows, self.sequence = engine, 0, engine.sequence

    def step(self, rows, wanted, reduction):
        assert 0 < len(rows) <= MAX_ROWS and len(wanted) <= LOGIT_ROWS
        self.rows += len(rows)
        return self._engine.step(rows, wanted, reduction)


def score(llama, pairs, n_lanes):
    """The scorings, and the rows that they took."""
    engine = Counting(llama._engine)
    scorings = [Scoring(*pair) for pair in pairs]
    done = list(run(engine, scorings, Reduction.ALL, n_lanes))
    assert sorted(done) == list(range(len(pairs)))
    return scorings, engine.rows


@pytest.mark.parametrize("n_lanes", [1, 3, 50])
def test_likelihoods_are_those_of_the_logits(llama, n_lanes):
    random = np.random.default_rng(0)
    sizes = [(1, 1), (1, 40), (70, 3), (30, 70), (5, 5), (150, 2)]
    pairs = [tuple(random.integers(0, llama.config.vocab_size, n).tolist() for n in size) for size in sizes]
    pairs += [(pairs[2][0], pairs[2][1][:1]), (pairs[2][0][:50], [7, 8])]  # of which others are the beginning
    found, _ = score(llama, pairs, n_lanes)
    for (context, continuation), scoring in zip(pairs, found, strict=True):
        logits = llama.logits(context + continuation[:-1])[len(context) - 1 :]
        assert scoring.is_greedy == (logits.argmax(axis=1).tolist() == continuation)
        assert scoring.log_likelihood == pytest.approx(-negative_log_likelihood(logits, continuation), abs=1e-4)


def test_what_a_model_writes_is_greedy(llama):
    prompt = llama.encode(QUESTION)
    written = [piece.token_id for piece in llama.generate(prompt, 5, GREEDY)]
    other = [*written[:-1], (written[-1] + 1) % llama.config.vocab_size]
    (right, wrong), _ = score(llama, [(prompt, written), (prompt, other)], 1)
    assert right.is_greedy and not wrong.is_greedy


def test_a_question_with_several_answers_is_run_once(llama):
    question = llama.encode(QUESTION)
    _, rows = score(llama, [(question, [answer, 5, 6]) for answer in (40, 50, 60, 70)], 1)
    assert rows == len(question) - 1 + 4 * 3  # its last token's candidates are wanted by all


@pytest.mark.parametrize("n_lanes", [1, 4])
def test_texts_are_those_of_the_engine_alone(llama, n_lanes):
    prompts = [llama.encode(text) for text in (QUESTION, "Question: A", "Question: Ann has 12 pears.", QUESTION)]
    sampler = Sampler(GREEDY, llama.config.vocab_size)
    asked = [Generation(prompt, 5 + 3 * i, [], sampler, llama.tokenizer) for i, prompt in enumerate(prompts)]
    assert len(list(run(llama._engine, asked, sampler.reduction([]), n_lanes))) == len(prompts)
    for i, (prompt, generation) in enumerate(zip(prompts, asked, strict=True)):
        ids = [piece.token_id for piece in llama.generate(prompt, 5 + 3 * i, GREEDY)]
        assert generation.text == llama.tokenizer.decode(ids)


def test_a_text_ends_before_what_it_must_not_hold(llama):
    prompt, sampler = llama.encode(QUESTION), Sampler(GREEDY, llama.config.vocab_size)
    whole = "".join(piece.text for piece in llama.generate(prompt, 20, GREEDY))
    stop = whole[6:9]
    generation = Generation(prompt, 20, ["never", "", stop], sampler, llama.tokenizer)
    list(run(llama._engine, [generation], sampler.reduction([]), 1))
    assert generation.text.strip() == whole[: whole.index(stop)].strip()
    assert len(generation.tokens) < len(prompt) + 20
