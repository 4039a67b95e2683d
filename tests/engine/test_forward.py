"""The forward pass against the float64 reference, and against itself: however the rows are cut up, the same logits."""

import numpy as np
import pytest

from dllama.engine.forward import Forward
from dllama.engine.interface import Row
from dllama.engine.workspace import MAX_ROWS
from dllama.errors import ModelError
from dllama.formats import FloatType
from dllama.kernels import tags
from dllama.kernels.team import Team
from tests.engine import reference
from tests.engine.feeding import run
from tests.engine.models import BLOCKED, BLOCKED_MOE, SHAPES, random_model

N = 45
EXACT = tags.F32, tags.F32
FAST = tags.Q80, tags.F16


@pytest.fixture(scope="module")
def teams():
    teams = {n: Team(n) for n in (1, 2, 3)}
    yield teams
    for team in teams.values():
        team.close()


@pytest.fixture
def build(tmp_path, teams):
    """build(shape, weight_type, act, cache, threads): the engine on a random model; its file is ``.model``."""

    def build(shape, weight_type=FloatType.F32, act=tags.F32, cache=tags.F32, threads=2):
        model = random_model(tmp_path / f"{weight_type.name}.m", shape, weight_type)
        return Forward(model, teams[threads], act, cache, shape["seq_len"])

    return build


def tokens_for(engine, n=N, seed=1) -> list[int]:
    return np.random.default_rng(seed).integers(0, engine.config.vocab_size, n).tolist()


def errors(found, expected) -> np.ndarray:
    """The error of each row, relative to the row's length."""
    return np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)


WAYS = {"one batch": [N], "pieces": [5, 1, 2, N - 8], "token by token": [1] * N}
ways = pytest.mark.parametrize("pieces", WAYS.values(), ids=WAYS)


@ways
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_in_float32(build, shape, pieces):
    engine = build(shape)
    tokens = tokens_for(engine)
    assert errors(run(engine, tokens, pieces), reference.logits(engine.source, tokens)).max() < 1e-5


# The reference rounds where the engine does, and then agrees as well as float32 allows, but for the rows where a value
# so close to the middle of two steps that it tips over either way comes in. ``tipped`` bounds these; ``unrounded``
# bounds the difference to a reference without any rounding. Both are about twice the largest of six random models.
COMBINATIONS = [
    # weights, act, cache, tipped, unrounded
    (FloatType.Q40, tags.F32, tags.F32, 1e-5, 1e-5),
    (FloatType.F16, tags.F32, tags.F16, 2e-4, 2e-3),
    (FloatType.F32, tags.Q80, tags.F32, 4e-2, 1e-1),
    (FloatType.Q40, tags.Q80, tags.F16, 4e-2, 1e-1),
    (FloatType.Q80, tags.Q80, tags.Q80, 4e-2, 1e-1),
]
ROUND_ACT = {tags.F32: reference.exact, tags.Q80: reference.q80}
ROUND_CACHE = {tags.F32: reference.exact, tags.F16: reference.f16, tags.Q80: reference.q80_file}


@ways
@pytest.mark.parametrize(
    "weight_type, act, cache, tipped, unrounded",
    COMBINATIONS,
    ids=[
        f"{weight.name.lower()} weights, {act.name} act, {cache.name} cache" for weight, act, cache, *_ in COMBINATIONS
    ],
)
def test_every_format(build, weight_type, act, cache, tipped, unrounded, pieces):
    engine = build(BLOCKED, weight_type, act, cache)
    tokens = tokens_for(engine)
    found = run(engine, tokens, pieces)
    rounded = errors(found, reference.logits(engine.source, tokens, ROUND_ACT[act], ROUND_CACHE[cache]))
    assert rounded.min() < 1e-6
    assert rounded.max() < tipped
    assert errors(found, reference.logits(engine.source, tokens)).max() < unrounded


@pytest.mark.parametrize("weight_type, act, cache, tipped, unrounded", [COMBINATIONS[i] for i in (0, 3, 4)])
def test_experts_in_quantised_formats(build, weight_type, act, cache, tipped, unrounded):
    """Without the rounding, a row may have chosen other experts."""
    engine = build(BLOCKED_MOE, weight_type, act, cache)
    tokens = tokens_for(engine)
    found = run(engine, tokens, WAYS["pieces"])
    rounded = errors(found, reference.logits(engine.source, tokens, ROUND_ACT[act], ROUND_CACHE[cache]))
    assert rounded.min() < 1e-6
    assert rounded.max() < tipped
    assert np.median(errors(found, reference.logits(engine.source, tokens))) < unrounded


def test_experts_without_a_finite_logit(build):
    """A damaged router leaves the engine to choose somebody, whatever comes of it."""
    engine = build(SHAPES["qwen3-moe"])
    with open(engine.source.path, "r+b") as file:
        file.seek(engine.source.info("router", 0).offset)
        file.write(np.full(7 * 64, np.nan, "<f4").tobytes())
    assert np.isnan(run(engine, tokens_for(engine), [N])).all()


@pytest.mark.parametrize("shape", ["gqa", "qwen3", "qwen3-moe"])
def test_long_prompts_past_a_full_batch(build, shape):
    engine = build(SHAPES[shape])
    tokens = tokens_for(engine, 2 * MAX_ROWS + 9)
    found = run(engine, tokens, [MAX_ROWS, MAX_ROWS, 8, 1])
    assert errors(found, reference.logits(engine.source, tokens)).max() < 1e-5


def test_sequences_in_one_call_do_not_see_each_other(build):
    """Three sequences at different positions, their rows dealt like cards, give what each gives alone."""
    engine = build(SHAPES["gqa"])
    texts = [tokens_for(engine, n, seed=n) for n in (20, 13, 7)]
    alone = [run(engine, tokens, [len(tokens)]) for tokens in texts]
    sequences = [engine.sequence() for _ in texts]
    done, steps = [0, 0, 0], [(6, 1, 0), (1, 1, 1), (0, 9, 2), (13, 2, 4)]
    for step in steps:
        rows, expected = [], []
        for turn in range(max(step)):
            for i, count in enumerate(step):
                if turn < count:
                    rows.append(Row(sequences[i], done[i], texts[i][done[i]]))
                    expected.append(alone[i][done[i]])
                    done[i] += 1
        assert errors(engine.forward(rows), np.array(expected)).max() < 1e-5
    assert done == [20, 13, 7]


def test_draft_tokens_are_checked_and_rewritten(build):
    """Several guesses of one sequence at once, logits for each; those refused are overwritten by the next call."""
    engine = build(SHAPES["llama3.1"], FloatType.F32, *EXACT)
    tokens = tokens_for(engine, 30)
    alone = run(engine, tokens, [1] * 30)
    sequence = engine.sequence()
    run(engine, tokens[:10], [10], sequence)
    wrong = [(token + 1) % engine.config.vocab_size for token in tokens]
    # Right guesses up to 14, wrong ones behind, then the same positions once more with the right ones.
    guesses = tokens[10:15] + wrong[15:22]
    found = engine.forward([Row(sequence, 10 + i, token) for i, token in enumerate(guesses)])
    assert errors(found[:5], alone[10:15]).max() < 1e-5
    assert errors(found[5:], alone[15:22]).min() > 1e-2
    found = engine.forward([Row(sequence, i, tokens[i]) for i in range(15, 30)])
    assert errors(found, alone[15:]).max() < 1e-5


def test_only_wanted_logits_are_given_in_the_order_asked_for(build):
    engine = build(SHAPES["mha"])
    tokens = tokens_for(engine, 12)
    everything = run(engine, tokens, [12])
    sequence = engine.sequence()
    rows = [Row(sequence, i, token) for i, token in enumerate(tokens)]
    for wanted in ([11], [0, 11], [7, 3, 5], []):
        found = engine.forward(rows, wanted)
        assert found.shape == (len(wanted), engine.config.vocab_size)
        np.testing.assert_allclose(found, everything[wanted], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shape", ["odd", "qwen3"])
def test_threads_do_not_change_a_bit_in_float32(build, shape):
    assert_same_for_all_threads(build, SHAPES[shape], FloatType.F32, *EXACT)


@pytest.mark.parametrize("shape", [{**BLOCKED, "hidden_dim": 480}, {**BLOCKED_MOE, "moe_hidden_dim": 480}])
def test_threads_do_not_change_a_bit_in_q40(build, shape):
    assert_same_for_all_threads(build, {**shape, "vocab_size": 999}, FloatType.Q40, *FAST)


def assert_same_for_all_threads(build, *settings):
    found = []
    for threads in (1, 2, 3):
        engine = build(*settings, threads=threads)
        tokens = tokens_for(engine)
        found.append(run(engine, tokens, [N - 3, 1, 1, 1]))
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


def test_a_run_is_repeatable_to_the_bit(build):
    engine = build(BLOCKED, FloatType.Q40, *FAST, threads=3)
    tokens = tokens_for(engine)
    first = run(engine, tokens, [N])
    for _ in range(20):
        np.testing.assert_array_equal(run(engine, tokens, [N]), first)


def test_what_cannot_be_run_is_refused(build):
    engine = build(SHAPES["mha"])
    sequence = engine.sequence()
    for rows in ([], [Row(sequence, i, 1) for i in range(MAX_ROWS + 1)]):
        with pytest.raises(ValueError, match=f"{len(rows)} rows, and a step takes 1 to {MAX_ROWS}"):
            engine.forward(rows)
    for position in (-1, 300, 10**12):
        with pytest.raises(ModelError, match=f"position {position} is outside the context of 300 tokens"):
            engine.forward([Row(sequence, position, 1)])
    for token in (-1, 70, 10**12):
        with pytest.raises(ModelError, match=f"token {token} is outside the vocabulary of 70"):
            engine.forward([Row(sequence, 0, token)])
    tokens = tokens_for(engine, 5)
    found = run(engine, tokens, [5], sequence)
    assert errors(found, reference.logits(engine.source, tokens)).max() < 1e-5, "an error leaves the engine usable"


def test_the_last_position_of_the_context_can_be_used(build):
    shape = {**SHAPES["mha"], "seq_len": 16}
    engine = build(shape)
    tokens = tokens_for(engine, 16)
    found = run(engine, tokens, [15, 1])
    assert errors(found, reference.logits(engine.source, tokens)).max() < 1e-5
