"""Adapters in the forward pass: what each row adds, against the float64 reference of a model merged with them."""

import numpy as np
import pytest

from converter.convert import Settings, convert
from dllama.engine.adapter_weights import AdapterWeights, ranks_of, values_of
from dllama.engine.adapters import NO_ADAPTER
from dllama.engine.forward import Forward
from dllama.engine.interface import Row
from dllama.engine.workspace import MAX_ROWS
from dllama.formats import FloatType, ModelFile
from dllama.kernels import tags
from dllama.kernels.team import Team
from dllama.lora import read_lora
from dllama.targets import TARGETS
from tests.engine import feeding, reference
from tests.engine.adapters import Merged, random_adapter
from tests.engine.checkpoints import build
from tests.engine.models import BLOCKED, SHAPES, random_model

N = 20


@pytest.fixture(scope="module")
def team():
    team = Team(2)
    yield team
    team.close()


def engine_with(model, team, adapters, act=tags.F32, cache=tags.F32) -> Forward:
    weights = AdapterWeights(ranks_of(adapters, model.config), model)
    weights.fill(values_of(adapters, model.config))
    return Forward(model, team, act, cache, model.config.seq_len, adapters=weights)


def tokens_for(engine, n=N, seed=1) -> list[int]:
    return np.random.default_rng(seed).integers(0, engine.config.vocab_size, n).tolist()


def run(engine, tokens, pieces, adapter=NO_ADAPTER) -> np.ndarray:
    """Logits of all tokens of a new sequence with this adapter, in ``pieces`` of so many rows."""
    return feeding.run(engine, tokens, pieces, engine.sequence(adapter))


def error(found, expected) -> float:
    """The largest error of a row, relative to the row's length."""
    return (np.linalg.norm(found - expected, axis=-1) / np.linalg.norm(expected, axis=-1)).max()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_shape_against_the_merged_model(tmp_path, team, shape):
    model = random_model(tmp_path / "a.m", shape)
    adapter = random_adapter(model.config, 0)
    engine = engine_with(model, team, [adapter])
    tokens = tokens_for(engine)
    expected = reference.logits(Merged(model, adapter), tokens)
    assert error(run(engine, tokens, [N], 0), expected) < 1e-5
    assert error(run(engine, tokens, [3, *[1] * (N - 3)], 0), expected) < 1e-5
    assert error(reference.logits(model, tokens), expected) > 0.1


@pytest.mark.parametrize(
    "rank, targets, layers", [(1, ("q",), (1,)), (40, ("v", "up"), (0, 1)), (8, ("down", "o"), (0,)), (2, ("k",), (0,))]
)
def test_some_targets_of_some_layers(tmp_path, team, rank, targets, layers):
    model = random_model(tmp_path / "a.m", SHAPES["gqa"])
    adapter = random_adapter(model.config, 0, rank, targets, layers)
    engine = engine_with(model, team, [adapter])
    tokens = tokens_for(engine)
    assert error(run(engine, tokens, [N], 0), reference.logits(Merged(model, adapter), tokens)) < 1e-5


def test_sequences_with_different_adapters_in_one_batch(tmp_path, team):
    """Three adapters of different ranks and targets, and none: each row gives what its sequence gives alone."""
    model = random_model(tmp_path / "a.m", SHAPES["llama3.1"])
    adapters = [
        random_adapter(model.config, 0),
        random_adapter(model.config, 1, 33, ("q", "k", "v", "o")),
        random_adapter(model.config, 2, 2, ("gate", "down"), (1,)),
    ]
    engine = engine_with(model, team, adapters)
    numbers = [0, NO_ADAPTER, 2, 1, 0]
    texts = [tokens_for(engine, N, seed) for seed in range(len(numbers))]
    sequences = [engine.sequence(number) for number in numbers]
    found = [[] for _ in texts]
    for start in range(0, N, 4):  # four rows of each at a time, dealt like cards
        places = [(i, start + j) for j in range(4) for i in range(len(texts))]
        logits = engine.forward([Row(sequences[i], position, texts[i][position]) for i, position in places])
        for (i, _), row in zip(places, logits, strict=True):
            found[i].append(row.copy())
    for number, tokens, rows in zip(numbers, texts, found, strict=True):
        merged = model if number == NO_ADAPTER else Merged(model, adapters[number])
        assert error(np.array(rows), reference.logits(merged, tokens)) < 1e-5
        assert error(np.array(rows), run(engine, tokens, [N], number)) < 1e-5


def test_a_full_batch(tmp_path, team):
    model = random_model(tmp_path / "a.m", SHAPES["gqa"])
    adapter = random_adapter(model.config, 0)
    engine = engine_with(model, team, [adapter])
    tokens = tokens_for(engine, MAX_ROWS + 9)
    found = run(engine, tokens, [MAX_ROWS, 9], 0)
    assert error(found, reference.logits(Merged(model, adapter), tokens)) < 1e-5


def test_sequences_without_one_are_the_model_s_own_to_the_bit(tmp_path, team):
    model = random_model(tmp_path / "a.m", BLOCKED, FloatType.Q40)
    plain = Forward(model, team, tags.Q80, tags.F16, model.config.seq_len)
    engine = engine_with(model, team, [random_adapter(model.config, 0)], tags.Q80, tags.F16)
    tokens = tokens_for(engine)
    pieces = [N - 2, 1, 1]
    np.testing.assert_array_equal(run(engine, tokens, pieces), run(plain, tokens, pieces))
    beside = [Row(engine.sequence(number), 0, 7) for number in (0, NO_ADAPTER)]
    base = plain.forward([Row(plain.sequence(), 0, 7), Row(plain.sequence(), 0, 7)]).copy()
    found = engine.forward(beside)
    np.testing.assert_array_equal(found[1], base[1])
    assert error(found[:1], base[:1]) > 0.1


def test_a_quantised_model(tmp_path, team):
    """A and B meet the floats that the rounded inputs of the model's own matrices are made from."""
    model = random_model(tmp_path / "a.m", BLOCKED, FloatType.Q40)
    adapter = random_adapter(model.config, 0)
    engine = engine_with(model, team, [adapter], tags.F32, tags.F32)
    tokens = tokens_for(engine)
    assert error(run(engine, tokens, [N - 2, 1, 1], 0), reference.logits(Merged(model, adapter), tokens)) < 1e-5
    rounded = engine_with(model, team, [adapter], tags.Q80, tags.F16)
    assert error(run(rounded, tokens, [N - 2, 1, 1], 0), reference.logits(Merged(model, adapter), tokens)) < 0.1


def test_threads_do_not_change_a_bit(tmp_path):
    model = random_model(tmp_path / "a.m", {**BLOCKED, "hidden_dim": 480}, FloatType.Q40)
    adapter = random_adapter(model.config, 0, 9)
    found = []
    for threads in (1, 2, 3):
        team = Team(threads)
        engine = engine_with(model, team, [adapter], tags.Q80, tags.F16)
        found.append(run(engine, tokens_for(engine), [N - 3, 1, 1, 1], 0))
        team.close()
    np.testing.assert_array_equal(found[1], found[0])
    np.testing.assert_array_equal(found[2], found[0])


@pytest.mark.parametrize("name", ["gqa", "llama3 rope", "qwen3"])
@pytest.mark.parametrize("rslora", [False, True])
def test_peft_s_logits(tmp_path, team, name, rslora):
    """What PEFT saves and what it merges: the adapter beside a converted checkpoint gives the merged one's logits."""
    torch = pytest.importorskip("torch", reason="needs torch")
    transformers = pytest.importorskip("transformers", reason="needs transformers")
    peft = pytest.importorskip("peft", reason="needs peft")
    checkpoint = build(name, tmp_path / "checkpoint")
    base = transformers.AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    modules = [target.module.split(".")[1] for target in TARGETS.values()]
    settings = peft.LoraConfig(r=4, lora_alpha=6, use_rslora=rslora, target_modules=modules, init_lora_weights=False)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(base, settings)
    adapted.save_pretrained(tmp_path / "adapter")
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    for folder in ("checkpoint", "merged"):
        convert(tmp_path / folder, tmp_path / f"{folder}.m", Settings(FloatType.F32))
    tokens = np.random.default_rng(1).integers(0, 50, N).tolist()
    with torch.no_grad():
        expected = merged(torch.tensor([tokens])).logits[0].numpy()
    with ModelFile(tmp_path / "checkpoint.m") as model, ModelFile(tmp_path / "merged.m") as whole:
        found = run(engine_with(model, team, [read_lora(tmp_path / "adapter")]), tokens, [N - 2, 1, 1], 0)
        assert error(found, run(Forward(whole, team, tags.F32, tags.F32, N), tokens, [N])) < 1e-4
    assert error(found, expected) < 1e-4
