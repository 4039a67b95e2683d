"""However many nodes, whatever their shares: the text is the one that a single node writes."""

import itertools
from dataclasses import replace

import numpy as np
import pytest

from dllama import Llama, SamplerSettings
from dllama.cluster import crew, key
from dllama.cluster.rounds import Form
from dllama.cluster.settings import ClusterSettings
from dllama.errors import ClusterError
from dllama.formats import FloatType, ModelFile
from dllama.lora import write_lora
from tests.cluster.checkpoints import SHAPES, VOCAB
from tests.engine.adapters import random_adapter
from tests.engine.golden import perplexity

GREEDY = SamplerSettings(temperature=0)
EXACT = {"buffer_float_type": "f32", "nthreads": 1, "context": 200}
PROMPT = np.random.default_rng(0).integers(3, VOCAB, 140).tolist()
"""Of more than one batch."""
NODES = (2, 3, 4, 5, 7)
UNEQUAL = (1.5, 1, 1.9, 1.1, 1.2, 1, 1.1)
EMBEDDED = "Question: Tom has 3 apples"


@pytest.fixture
def form(monkeypatch):
    """``form(Form.SCATTER)`` makes every plan take that form."""

    def force(form: Form) -> None:
        make_plan = crew.make_plan

        def forced(*args, **options):
            plan = make_plan(*args, **options)
            vars(plan)["form"] = form
            return plan

        monkeypatch.setattr(crew, "make_plan", forced)

    return force


def cluster(workers, ratios) -> ClusterSettings:
    return ClusterSettings(tuple(worker.address for worker in workers), None, tuple(ratios))


def ids(pieces) -> list[int]:
    return [piece.token_id for piece in pieces]


@pytest.fixture(scope="module")
def alone(models):
    """What one node writes, by the model."""
    texts = {}

    def text(model) -> list[int]:
        if model not in texts:
            with Llama(*models[model], **EXACT) as llama:
                texts[model] = ids(llama.generate(PROMPT, 24, GREEDY))
        return texts[model]

    return text


FORMS = itertools.cycle(Form)


@pytest.mark.parametrize(
    "shape, weights, nodes, kind",
    [(*which, next(FORMS)) for which in itertools.product(SHAPES, (FloatType.F32, FloatType.Q40), NODES)],
)
def test_random_models(workers, models, alone, form, shape, weights, nodes, kind):
    form(kind)
    for ratios in (UNEQUAL[:nodes], [1] * nodes):
        with Llama(*models[shape, weights], **EXACT, cluster=cluster(workers(nodes - 1), ratios)) as llama:
            assert llama._engine.plan.form is kind and len(llama._engine.plan.shares) == nodes
            assert ids(llama.generate(PROMPT, 24, GREEDY)) == alone((shape, weights))


@pytest.mark.parametrize("weights, nodes", [(FloatType.F32, 2), (FloatType.Q40, 3), (FloatType.F32, 4)])
def test_a_mixture_of_experts(workers, models, alone, weights, nodes):
    """Of four nodes one has no hidden values of the experts."""
    with Llama(*models["experts", weights], **EXACT, cluster=cluster(workers(nodes - 1), [1] * nodes)) as llama:
        assert [len(share.ffn_blocks) for share in llama.plan.shares] == {2: [2, 1], 3: [1] * 3, 4: [1, 1, 1, 0]}[nodes]
        assert ids(llama.generate(PROMPT, 24, GREEDY)) == alone(("experts", weights))


@pytest.mark.parametrize("nodes, kind", [(2, Form.SCATTER), (3, Form.FOLD), (4, Form.BUTTERFLY), (7, Form.MESH)])
def test_the_embedded_model(workers, form, nodes, kind):
    with Llama(buffer_float_type="f32") as llama:
        expected = list(llama.generate(EMBEDDED, 40, GREEDY))
    form(kind)
    with Llama(buffer_float_type="f32", cluster=cluster(workers(nodes - 1), UNEQUAL[:nodes])) as llama:
        pieces = list(llama.generate(EMBEDDED, 40, GREEDY))
    assert [piece.text for piece in pieces] == [piece.text for piece in expected]


def test_parts_that_come_before_their_step_are_counted(workers, form):
    """In a mesh all workers receive the same."""
    form(Form.MESH)
    with Llama(buffer_float_type="f32", cluster=cluster(workers(3), [1] * 4)) as llama:
        pieces = [piece for piece in llama.generate(EMBEDDED, 60, GREEDY) if piece.nodes]
    assert len(pieces) == 59
    for piece in pieces:
        assert len({node.received_bytes for node in piece.nodes[1:]}) == 1


@pytest.mark.parametrize("kind", list(Form))
@pytest.mark.parametrize("weights", [FloatType.F32, FloatType.Q40])
def test_logits(workers, models, form, weights, kind):
    options = {**EXACT, "kv_float_type": "f32"}
    with Llama(*models["gqa", weights], **options) as llama:
        expected = llama.logits(PROMPT)
    form(kind)
    with Llama(*models["gqa", weights], **options, cluster=cluster(workers(3), (2, 1, 3, 1))) as llama:
        np.testing.assert_allclose(llama.logits(PROMPT), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "settings", [GREEDY, SamplerSettings(seed=5), SamplerSettings(temperature=1.2, top_k=20, seed=2)]
)
def test_interleaved_sequences(workers, models, settings):
    prompts = [PROMPT[:5], PROMPT[7:60], PROMPT]
    with Llama(*models["few kv heads", FloatType.Q40], **EXACT) as llama:
        alone = [ids(llama.generate(prompt, 12, settings)) for prompt in prompts]
    with Llama(*models["few kv heads", FloatType.Q40], **EXACT, cluster=cluster(workers(2), (1, 1, 1))) as llama:
        together = itertools.zip_longest(*(llama.generate(prompt, 12, settings) for prompt in prompts))
        columns = list(zip(*together, strict=True))
        assert [ids(filter(None, column)) for column in columns] == alone
        assert ids(llama.generate(prompts[0], 12, settings)) == alone[0], "after those that are gone"


@pytest.mark.parametrize(
    "shape, weights, ratios",
    [
        ("few kv heads", FloatType.F32, UNEQUAL[:3]),
        ("gqa", FloatType.Q40, [1] * 7),
        ("experts", FloatType.F32, [1] * 4),
    ],
)
def test_adapters(workers, models, tmp_path, shape, weights, ratios):
    """Sequences with different ones, and without; of a mixture's experts some nodes have nothing."""
    path, tokenizer = models[shape, weights]
    adapters = {name: tmp_path / name for name in ("one", "other")}
    with ModelFile(path) as model:
        for seed, folder in enumerate(adapters.values()):
            write_lora(folder, random_adapter(model.config, seed, 4 + seed), "a model")
    options = {**EXACT, "kv_float_type": "f32", "adapters": adapters}
    names = ["one", None, "other"]
    with Llama(path, tokenizer, **options) as llama:
        alone = [ids(llama.generate(PROMPT[:30], 12, GREEDY, name)) for name in names]
        logits = llama.logits(PROMPT, "one")
        assert abs(logits - llama.logits(PROMPT)).max() > 0.1
    with Llama(path, tokenizer, **options, cluster=cluster(workers(len(ratios) - 1), ratios)) as llama:
        texts = (llama.generate(PROMPT[:30], 12, GREEDY, name) for name in names)
        columns = list(zip(*itertools.zip_longest(*texts), strict=True))
        assert [ids(filter(None, column)) for column in columns] == alone
        np.testing.assert_allclose(llama.logits(PROMPT, "one"), logits, rtol=1e-4, atol=1e-4)


def test_a_cluster_with_a_key(workers, models, alone):
    """Also between its workers; a root without the key is told so, and changes nothing."""
    cluster_key = key.generate()
    settings = cluster(workers(2, key=cluster_key), (1, 1, 1))
    with pytest.raises(ClusterError, match="it asks for the cluster key, and --insecure was given here"):
        Llama(*models["gqa", FloatType.Q40], **EXACT, cluster=settings)
    with Llama(*models["gqa", FloatType.Q40], **EXACT, cluster=replace(settings, key=cluster_key)) as llama:
        assert ids(llama.generate(PROMPT, 24, GREEDY)) == alone(("gqa", FloatType.Q40))


@pytest.mark.parametrize("nodes", [2, 4])
def test_q80_buffers_cost_next_to_nothing(workers, nodes):
    alone = perplexity()
    together = perplexity(cluster=cluster(workers(nodes - 1), [1] * nodes))
    print(f"perplexity {alone:.4f} on one node, {together:.4f} on {nodes}")
    assert abs(together / alone - 1) < 0.01
