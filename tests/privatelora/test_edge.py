"""Edge and cloud over real sockets: the logits are those of one node with the adapter merged."""

import time

import numpy as np
import pytest

from dllama.engine.candidates import Reduction
from dllama.engine.forward import Forward
from dllama.engine.interface import Row
from dllama.engine.workspace import MAX_ROWS
from dllama.errors import AdapterError
from dllama.formats import ModelFile
from dllama.kernels import tags
from dllama.kernels.team import Team
from dllama.privatelora.adapter import CLOUD_FILE, EDGE_FILE, write_adapter
from dllama.privatelora.answers import Answers
from dllama.privatelora.passage import Stop
from dllama.targets import TARGETS
from tests.engine import reference
from tests.engine.feeding import run as run_alone
from tests.engine.models import SHAPES, random_model
from tests.privatelora.adapters import merged_logits, strong_halves
from tests.privatelora.nodes import CloudProcess, CloudThread, edge, run

N = 20
EVERY = tuple(TARGETS)
FOUR = {**SHAPES["gqa"], "n_layers": 4}


def some_tokens(model: ModelFile, count: int = N, seed: int = 3) -> list[int]:
    return np.random.default_rng(seed).integers(0, model.config.vocab_size, count).tolist()


def off(found, expected) -> float:
    """The largest error, as a share of the largest logit."""
    return abs(found - expected).max() / abs(expected).max()


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    """A model of four layers, its cloud, the folder of an adapter of every target and its halves."""
    folder = tmp_path_factory.mktemp("four")
    model = random_model(folder / "model.m", FOUR)
    pair = strong_halves(model.config, EVERY)
    write_adapter(folder, *pair)
    with CloudProcess(folder / "model.m") as cloud:
        yield model, cloud, folder, pair
        assert cloud.alive, cloud.lines


@pytest.mark.parametrize("layers", [(0, 0), (1, 0), (0, 2), (1, 2)])
def test_logits_are_those_of_the_merged_model(four, layers):
    model, cloud, folder, pair = four
    tokens = some_tokens(model)
    with edge(model, cloud.address, adapter=folder, edge_layers=layers) as engine:
        sequence = engine.sequence()
        found = np.concatenate([run(engine, tokens[:13], sequence), run(engine, tokens[13:], sequence, 13)])
    assert off(found, merged_logits(model, tokens, *pair)) < 1e-4
    assert off(found, reference.logits(model, tokens)) > 0.1, "an adapter that does nothing would pass"


@pytest.mark.parametrize("layers", [(0, 0), (1, 1)])
def test_without_an_adapter_the_logits_are_those_of_one_node(four, layers):
    model, cloud, _, _ = four
    tokens = some_tokens(model)
    team = Team(1)
    alone = run_alone(Forward(model, team, tags.F32, tags.F32, 64), tokens, [15, 1, 1, 3])
    team.close()
    with edge(model, cloud.address, edge_layers=layers) as engine:
        sequence = engine.sequence()
        found = [run(engine, tokens[a:b], sequence, a) for a, b in ((0, 15), (15, 16), (16, 17), (17, 20))]
    # Not to the last bit: what is compiled by itself and with its callers may order its sums differently.
    np.testing.assert_allclose(np.concatenate(found), alone, rtol=0, atol=1e-5 * abs(alone).max())


@pytest.mark.parametrize("form, bound", [("f16", 1e-2), ("q80", 8e-2)])
def test_what_travels_may_be_rounded(four, form, bound):
    model, cloud, folder, pair = four
    tokens = some_tokens(model)
    with edge(model, cloud.address, adapter=folder, form=form, edge_layers=(1, 0)) as engine:
        found = run(engine, tokens)
    assert 1e-5 < off(found, merged_logits(model, tokens, *pair)) < bound


def test_several_sequences_share_a_step(four):
    model, cloud, folder, pair = four
    texts = [some_tokens(model, 6, seed) for seed in range(3)]
    with edge(model, cloud.address, adapter=folder, edge_layers=(1, 1)) as engine:
        sequences = [engine.sequence() for _ in texts]
        found = [[], [], []]
        for first, last in ((0, 4), (4, 5), (5, 6)):
            rows = [
                Row(sequence, position, text[position])
                for sequence, text in zip(sequences, texts, strict=True)
                for position in range(first, last)
            ]
            out = engine.step(rows, range(len(rows)), Reduction.ALL)
            for i, candidates in enumerate(out):
                found[i // (last - first)].append(candidates.logits.copy())
    for text, logits in zip(texts, found, strict=True):
        assert off(np.array(logits), merged_logits(model, text, *pair)) < 1e-4


def test_only_what_is_wanted_comes_back(four):
    model, cloud, folder, pair = four
    tokens = some_tokens(model)
    with edge(model, cloud.address, adapter=folder) as engine:
        sequence = engine.sequence()
        rows = [Row(sequence, i, token) for i, token in enumerate(tokens)]
        assert engine.step(rows[:10], [], Reduction.ALL) == []
        (found,) = engine.step(rows[10:], [8], Reduction.ALL)
    assert off(found.logits, merged_logits(model, tokens, *pair)[18]) < 1e-4


@pytest.mark.parametrize("layers", [(0, 0), (1, 1)])
def test_a_prompt_of_more_rows_than_a_pass_has(four, layers):
    model, cloud, folder, pair = four
    tokens = some_tokens(model, 2 * MAX_ROWS + 7)
    with edge(model, cloud.address, adapter=folder, edge_layers=layers) as engine:
        sequence = engine.sequence()
        found = np.concatenate([run(engine, tokens[:260], sequence), run(engine, tokens[260:], sequence, 260)])
    assert off(found, merged_logits(model, tokens, *pair)) < 1e-4


def test_a_whole_prompt_meets_the_edge_once_at_each_stop(four, monkeypatch):
    model, cloud, folder, _ = four
    tokens, met = some_tokens(model, 2 * MAX_ROWS + 7), []
    answer = Answers.__call__

    def noted(answers, stop, payload, rows):
        met.append((stop, rows))
        return answer(answers, stop, payload, rows)

    monkeypatch.setattr(Answers, "__call__", noted)
    with edge(model, cloud.address, adapter=folder) as engine:
        run(engine, tokens)
    assert met == [(Stop(layer, product), len(tokens)) for layer in range(4) for product in range(4)]


def test_a_prompt_of_more_rows_than_a_step_has(four, monkeypatch):
    model, cloud, folder, pair = four
    tokens = some_tokens(model, 40)
    with edge(model, cloud.address, adapter=folder) as engine:
        monkeypatch.setattr(engine, "most_rows", 17)
        found = run(engine, tokens)
    assert off(found, merged_logits(model, tokens, *pair)) < 1e-4


def test_a_sequence_taken_back_and_written_again(four):
    model, cloud, folder, pair = four
    tokens, other = some_tokens(model), some_tokens(model, seed=4)
    with edge(model, cloud.address, adapter=folder) as engine:
        sequence = engine.sequence()
        run(engine, tokens, sequence)
        found = run(engine, other[7:], sequence, 7)
    assert off(found, merged_logits(model, tokens[:7] + other[7:], *pair)[7:]) < 1e-4


@pytest.mark.parametrize(
    "targets, layers", [(("q",), None), (("k", "down"), (1, 3)), (("o", "gate"), (0,)), (EVERY, (2,))]
)
def test_only_some_targets_of_some_layers(four, tmp_path, targets, layers):
    model, cloud, _, _ = four
    tokens = some_tokens(model)
    pair = strong_halves(model.config, targets, layers, (33, 5))
    write_adapter(tmp_path, *pair)
    with edge(model, cloud.address, adapter=tmp_path / EDGE_FILE, edge_layers=(1, 0)) as engine:
        found = run(engine, tokens)
    assert off(found, merged_logits(model, tokens, *pair)) < 1e-4


def test_noise_changes_what_enters(four):
    model, cloud, folder, _ = four
    tokens = some_tokens(model)
    with edge(model, cloud.address, adapter=folder) as engine:
        exact = run(engine, tokens)
    with edge(model, cloud.address, adapter=folder, noise=0.01) as engine:
        sequence = engine.sequence()
        noisy, again = run(engine, tokens, sequence), run(engine, tokens, sequence)
        other = run(engine, tokens)
    assert 1e-4 < off(noisy, exact) < 0.5
    assert off(other, noisy) > 1e-4
    np.testing.assert_array_equal(again, noisy, "other noise for a row that is sent again could be averaged away")


@pytest.mark.parametrize("name", ["qwen3", "qwen3-moe", "odd", "llama3.1"])
def test_other_architectures(tmp_path, name):
    model = random_model(tmp_path / "model.m", SHAPES[name])
    tokens = some_tokens(model)
    pair = strong_halves(model.config, ("q", "k", "v", "o") if "moe" in name else EVERY)
    write_adapter(tmp_path, *pair)
    with CloudThread(tmp_path / "model.m") as cloud, edge(model, cloud.address, adapter=tmp_path) as engine:
        found = run(engine, tokens)
    assert off(found, merged_logits(model, tokens, *pair)) < 1e-4


def test_a_and_b_from_a_file(four, tmp_path):
    model, _, _, _ = four
    tokens = some_tokens(model)
    pair = strong_halves(model.config, EVERY, seed=None)
    write_adapter(tmp_path, *pair)
    expected = merged_logits(model, tokens, *pair)
    with CloudThread(model.path, adapters=[tmp_path / CLOUD_FILE]) as cloud:
        with edge(model, cloud.address, adapter=tmp_path / EDGE_FILE) as engine:
            assert off(run(engine, tokens), expected) < 1e-4
        with edge(model, cloud.address, adapter=tmp_path / EDGE_FILE, edge_layers=(1, 1)) as engine:
            assert off(run(engine, tokens), expected) < 1e-4, "those of its own layers lie beside the edge's half"
        (tmp_path / CLOUD_FILE).unlink()
        with pytest.raises(AdapterError, match="the edge's own layers need its A and B too: put cloud.plora beside it"):
            with edge(model, cloud.address, adapter=tmp_path / EDGE_FILE, edge_layers=(1, 1)):
                pass
        with edge(model, cloud.address, adapter=tmp_path / EDGE_FILE) as engine:
            assert off(run(engine, tokens), expected) < 1e-4, "where it has none it does without"


def test_what_a_step_costs(four):
    """The cloud works in part while the edge answers: only what it does not work is lost to the network."""
    model, cloud, folder, _ = four
    with edge(model, cloud.address, adapter=folder) as engine:
        for count in (9, 1):
            start = time.perf_counter()
            run(engine, some_tokens(model, count))
            seconds = time.perf_counter() - start
            own, far = engine.cost
            assert own.inference_ms > 0 and own.transfer_ms > 0
            assert far.inference_ms > 0 and far.transfer_ms > 0
            assert far.inference_ms + far.transfer_ms < 1e3 * seconds
