"""A cloud over several nodes: its edges get what one node would give them, also while a worker is lost."""

import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dllama.cluster.settings import ClusterSettings
from dllama.embedded import model_path
from dllama.errors import ClusterError
from dllama.formats import FloatType, ModelFile
from dllama.privatelora.adapter import CLOUD_FILE, EDGE_FILE, write_adapter
from dllama.privatelora.backends.cluster import over_workers
from dllama.privatelora.cloud import Cloud, CloudSettings
from dllama.targets import TARGETS
from tests.cluster.nodes import measure_little, say
from tests.cluster.processes import Pool, Process
from tests.engine import reference
from tests.engine.models import SHAPES, random_model
from tests.privatelora.adapters import merged_logits, strong_halves
from tests.privatelora.nodes import EXACT, edge, open_llama, run, write
from tests.privatelora.test_edge import off, some_tokens

EVERY = tuple(TARGETS)
PROMPT = "Question: Tom has 3 apples and buys 4 more. How many apples does he have now?"
STEPS = 16


def cloud(model: str, workers, ratios, types=("f32", "f32"), patience: float = 10.0, **options) -> None:
    """A cloud over these workers; says its port, and what happens."""
    measure_little()
    settings = ClusterSettings(tuple(workers), None, ratios, step_timeout=patience)
    backend = over_workers(settings, 1, *map(FloatType.parse, types), say, lambda *_: None)
    node = Cloud(CloudSettings("127.0.0.1", 0, None, 1, model, **options), backend, say)
    say(f"over {node.device}")
    say(str(node.port))
    node.serve()


@pytest.fixture(scope="module")
def pool(tmp_path_factory):
    pool = Pool(tmp_path_factory.mktemp("slices"))
    yield pool
    pool.close()


@pytest.fixture
def cloud_over(pool):
    """``cloud_over(model, ratios)``: a live cloud over workers, one for each ratio but the first."""
    started = []

    def start(model, ratios, workers=None, **options) -> Process:
        workers = workers or pool(len(ratios) - 1)
        started.append(Process(cloud, str(model), [worker.address for worker in workers], ratios, **options))
        return started[-1]

    yield start
    for process in started:
        assert process.alive, process.lines
        process.close()
    pool.end_own()


def in_pieces(engine, tokens, pieces=(13, 1, 1)) -> np.ndarray:
    """Logits of a prompt, of single tokens, and of the rest at once."""
    ends = np.cumsum(pieces).tolist()
    sequence = engine.sequence()
    spans = zip([0, *ends], [*ends, len(tokens)], strict=True)
    return np.concatenate([run(engine, tokens[first:end], sequence, first) for first, end in spans])


@pytest.mark.parametrize(
    "shape, targets, ratios, layers",
    [
        ("gqa", EVERY, (1, 1), (0, 0)),
        ("gqa", EVERY, (2, 1, 1), (1, 1)),
        ("gqa", ("q", "k", "v"), (1, 1, 1), (0, 0)),
        ("qwen3-moe", ("q", "v", "o"), (1, 1, 1), (0, 0)),
        ("odd", ("o", "down"), (1, 1, 1), (0, 1)),
    ],
)
def test_logits_are_those_of_the_merged_model(cloud_over, tmp_path, shape, targets, ratios, layers):
    model = random_model(tmp_path / "model.m", {**SHAPES[shape], "n_layers": 3})
    pair = strong_halves(model.config, targets)
    write_adapter(tmp_path, *pair)
    tokens = some_tokens(model, 150)  # the last piece is more than one passage
    cluster = cloud_over(model.path, ratios)
    with edge(model, cluster.address, adapter=tmp_path, edge_layers=layers) as engine:
        found = in_pieces(engine, tokens)
    assert off(found, merged_logits(model, tokens, *pair)) < 1e-4
    cluster.said(f"over cpu, {len(ratios)} nodes")


def test_nodes_that_round(cloud_over, tmp_path):
    """With Q80 activations A and B are F16 in their memory, and parts travel as Q80."""
    model = random_model(tmp_path / "model.m", SHAPES["gqa"])
    pair = strong_halves(model.config, EVERY)
    write_adapter(tmp_path, *pair)
    tokens = some_tokens(model)
    cluster = cloud_over(model.path, (2, 1, 1), types=("q80", "f32"))
    with edge(model, cluster.address, adapter=tmp_path) as engine:
        found = in_pieces(engine, tokens)
    assert 1e-6 < off(found, merged_logits(model, tokens, *pair, act=reference.q80)) < 8e-2


def test_two_edges_at_once_with_adapters_of_their_own(cloud_over, tmp_path):
    """And a third one without."""
    model = random_model(tmp_path / "model.m", {**SHAPES["gqa"], "n_layers": 3})
    cluster = cloud_over(model.path, (1, 1, 1))

    def work(number: int) -> float:
        pair = strong_halves(model.config, EVERY, ranks=((6, 9), (33, 5))[number], seed=number, m_seed=number)
        write_adapter(tmp_path / str(number), *pair)
        tokens = some_tokens(model, 40, number)
        with edge(model, cluster.address, adapter=tmp_path / str(number)) as engine:
            return off(in_pieces(engine, tokens, [7] + 25 * [1]), merged_logits(model, tokens, *pair))

    def work_without() -> float:
        tokens = some_tokens(model, 40, 9)
        with edge(model, cluster.address) as engine:
            return off(in_pieces(engine, tokens, [7] + 25 * [1]), reference.logits(model, tokens))

    with ThreadPoolExecutor(3) as threads:
        errors = [threads.submit(work, 0), threads.submit(work, 1), threads.submit(work_without)]
        assert max(error.result() for error in errors) < 1e-4


def test_a_worker_that_is_killed_in_mid_text(cloud_over, pool, tmp_path):
    write_adapter(tmp_path, *strong_halves(ModelFile(model_path()).config, ("q", "v", "o")))
    lines, (first, second) = [], pool(2, cache=None)
    cluster = cloud_over(model_path(), (1, 1, 1), (first, second), types=EXACT)
    with open_llama(cluster.address, lines.append, adapter=tmp_path) as llama:
        expected = write(llama, PROMPT, STEPS)
        assert write(llama, PROMPT, STEPS, fault=first.kill) == expected != ""
        (lost,) = [line for line in lines if "is lost at token" in line]
        assert f"this cloud is busy: its worker {first.address} is lost: " in lost
        cluster.said(f"worker {first.address} is lost by the cloud")
        first.restart()
        assert write(llama, PROMPT, STEPS, fault=second.kill) == expected, "alone"
        second.restart()
    with open_llama(cluster.address, lines.append, adapter=tmp_path) as llama:
        assert write(llama, PROMPT, STEPS) == expected
        assert "3 nodes" in lines[-1], "those that are back take part, once nobody is at work"


@pytest.mark.parametrize("how", ["kill", "hang"])
def test_edges_that_are_idle_as_a_worker_is_lost(cloud_over, pool, tmp_path, how):
    """All of them are at work again afterwards: the one that finds out, the others, and one that comes then."""
    model = random_model(tmp_path / "model.m", SHAPES["gqa"])
    pair = strong_halves(model.config, EVERY)
    write_adapter(tmp_path, *pair)
    workers, tokens = pool(2, cache=None), some_tokens(model)
    cluster = cloud_over(model.path, (1, 1, 1), workers, patience=1.5)

    def adapted():
        return edge(model, cluster.address, adapter=tmp_path)

    with adapted() as one, adapted() as other, edge(model, cluster.address) as plain:
        engines = [one, other, plain]
        sequences = [engine.sequence() for engine in engines]
        before = [run(*each, 0) for each in zip(engines, [tokens[:9]] * 3, sequences, strict=True)]
        getattr(workers[1], how)()
        with adapted() as new:
            assert off(run(new, tokens), merged_logits(model, tokens, *pair)) < 1e-4
        after = [run(*each, 9) for each in zip(engines, [tokens[9:]] * 3, sequences, strict=True)]
    found = [np.concatenate(both) for both in zip(before, after, strict=True)]
    assert max(off(logits, merged_logits(model, tokens, *pair)) for logits in found[:2]) < 1e-4
    assert off(found[2], reference.logits(model, tokens)) < 1e-4
    cluster.said(f"worker {workers[1].address} is lost by the cloud")


def test_an_adapter_without_a_seed(cloud_over, tmp_path):
    model = random_model(tmp_path / "model.m", SHAPES["gqa"])
    write_adapter(tmp_path, *strong_halves(model.config, ("q",), seed=None))
    cluster = cloud_over(model.path, (1, 1), adapters=[tmp_path / CLOUD_FILE])
    reason = "makes A and B out of a seed, and this adapter has none: start the cloud without --workers"
    with pytest.raises(ClusterError, match=f"^cloud {re.escape(cluster.address)}: [^\n]*{reason}$"):
        with edge(model, cluster.address, adapter=tmp_path / EDGE_FILE):
            pass
    with edge(model, cluster.address) as engine:
        run(engine, some_tokens(model))


def test_an_adapter_of_too_large_a_rank(cloud_over, tmp_path):
    model = random_model(tmp_path / "model.m", SHAPES["gqa"])
    write_adapter(tmp_path, *strong_halves(model.config, ("q",), ranks=(4, model.config.dim + 1)))
    cluster = cloud_over(model.path, (1, 1))
    with pytest.raises(ClusterError, match="an adapter of rank 81, and the model is 80 wide"):
        with edge(model, cluster.address, adapter=tmp_path):
            pass
    with edge(model, cluster.address) as engine:
        run(engine, some_tokens(model))
