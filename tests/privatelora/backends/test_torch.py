"""The torch backend against the CPU's own, which is tested against the engine."""

import gc
import sys

import numpy as np
import pytest

from dllama.errors import KernelError, ModelError, OutOfMemoryError
from dllama.formats import FloatType
from dllama.privatelora.adapter import CloudAdapter
from dllama.privatelora.backends.torch import open_torch
from dllama.privatelora.frozen_weights import MOST_ADAPTERS
from dllama.privatelora.passage import stops
from tests.engine.models import BLOCKED, BLOCKED_MOE, GQA, MHA, QWEN3, QWEN3_MOE, SHAPES, random_model
from tests.privatelora.backends.edges import CONTEXT, Edge, agree, alternately, several_edges, shape_of, step

torch = pytest.importorskip("torch", reason="needs torch")

from dllama.privatelora.backends.torch.plan import MOST_MIXTURES  # noqa: E402


@pytest.mark.parametrize("name", SHAPES)
def test_every_architecture_with_several_edges_agrees_with_the_cpu(tmp_path, on_cpu, name):
    model = random_model(tmp_path / "m.m", SHAPES[name])
    agree(several_edges(open_torch(model, "cpu")), several_edges(on_cpu(model)))


@pytest.mark.parametrize("targets", [("q", "v"), ("k",), ("q", "k", "v"), ("o", "up"), ("down",)])
def test_some_targets_of_some_layers(tmp_path, on_cpu, targets):
    model = random_model(tmp_path / "m.m", {**GQA, "n_layers": 4})

    def play(backend):
        edge = Edge(backend, 1, shape_of(model.config, targets=targets, layers=(0, 1, 3)), range(1, 4))
        return [out for n in (9, 1, 1) for out in step([edge], [n])]

    agree(play(open_torch(model, "cpu")), play(on_cpu(model)))


def test_a_long_step_passage_by_passage(tmp_path, on_cpu):
    """Between two stops each takes its turn, and the later ones attend to the earlier."""
    model = random_model(tmp_path / "m.m", GQA)

    def play(backend):
        adapter, sizes = shape_of(model.config), (64, 50, 5)
        parts = [first := Edge(backend, 1, adapter)]
        for size in sizes[:-1]:
            before = parts[-1]
            parts.append(part := Edge(backend, 1, adapter, number=first.number))
            part.sequence, part.position = first.sequence, before.position + size
        return step(parts, sizes, lambda k, parts: [[part] for part in parts])

    agree(play(open_torch(model, "cpu")), play(on_cpu(model)))


@pytest.mark.parametrize("shape", [GQA, QWEN3, QWEN3_MOE])
def test_edges_with_one_adapter_come_and_go_in_batches_of_fixed_shapes(tmp_path, on_cpu, shape):
    model = random_model(tmp_path / "m.m", shape)

    def play(backend):
        adapter = shape_of(model.config)
        first = Edge(backend, 1, adapter)
        edges = [first, *(Edge(backend, seed, adapter, number=first.number) for seed in (2, 3))]
        out = step(edges, (61, 5, 30))
        for k in range(4):
            out += step(edges, (1, 1, 1), alternately if k == 2 else lambda k, edges: [edges])
            out += step(edges[k % 2 :][:2], (1, 1))
        edges[1] = Edge(backend, 4, adapter, number=first.number)
        return [*out, *step(edges, (1, 1, 1)), *step(edges, (1, 1, 1))]

    agree(play(open_torch(model, "cpu")), play(on_cpu(model)))


def test_edges_with_adapters_of_their_own_in_batches_of_fixed_shapes(tmp_path, on_cpu):
    """Of unequal ranks, one of them for two edges, and none; then one goes, and another takes its number."""
    model = random_model(tmp_path / "m.m", GQA)

    def play(backend):
        shared = shape_of(model.config)
        edges = [Edge(backend, 1, shared), Edge(backend, 2, shape_of(model.config, 12, 3)), Edge(backend, 3)]
        edges.insert(1, Edge(backend, 4, shared, number=edges[0].number))
        out = step(edges, (61, 5, 30, 7))
        for k in range(4):
            out += step(edges, (1, 1, 1, 1), alternately if k == 2 else lambda k, edges: [edges])
            out += step(edges[1:], (1, 1, 1))
        gone = edges.pop(2)
        backend.remove(gone.number)
        edges.insert(2, Edge(backend, 5, shape_of(model.config, 3, 14)))
        assert edges[2].number == gone.number
        for _ in range(3):
            out += step(edges, (1, 1, 1, 1))
        return out

    backend = open_torch(model, "cpu")
    agree(play(backend), play(on_cpu(model)))
    assert backend._plan.key is not None


def test_only_so_many_mixtures_of_adapters_are_of_a_fixed_shape(tmp_path):
    backend = open_torch(random_model(tmp_path / "m.m", MHA), "cpu")
    edges = [Edge(backend, seed, shape_of(backend.config)) for seed in range(5)]

    def key(*members):
        step([edges[i] for i in members], (1,) * len(members))
        return backend._plan.key

    pairs = [(i, j) for i in range(5) for j in range(i + 1, 5)]
    kept = [key(*pair) is not None for pair in pairs]
    assert kept == [True] * MOST_MIXTURES + [False] * (len(pairs) - MOST_MIXTURES)
    assert key(*pairs[0]) is not None and key(0) is not None
    backend.remove(edges[4].number)
    assert key(1, 3) is not None, "with an adapter those go that it was in"


def test_sequences_count_as_full(tmp_path, monkeypatch):
    backend = open_torch(random_model(tmp_path / "m.m", MHA), "cpu")
    monkeypatch.setenv("DLLAMA_MEMORY_LIMIT", "1000000000")
    before, each = backend.free_bytes(), backend.sequence_bytes(CONTEXT)
    one, other = Edge(backend, 1), Edge(backend, 2)
    assert backend.free_bytes() == before - 2 * each
    step([one], [CONTEXT // 2])
    taken = len(one.sequence.pages) * backend._stack.pool.page_bytes
    assert taken > 0 and backend.free_bytes() == before - 2 * each + taken + backend._stack.pool.free_bytes()
    del other
    gc.collect()
    assert backend.free_bytes() == before - each + taken + backend._stack.pool.free_bytes()


def test_another_adapter_in_the_place_of_one_that_left(tmp_path, on_cpu):
    model = random_model(tmp_path / "m.m", MHA)

    def play(backend):
        out = []
        for seed in (1, 2):
            edge = Edge(backend, seed, shape_of(model.config, 4 + seed))
            assert edge.number == 0
            out += step([edge], [1]) + step([edge], [1])
            backend.remove(edge.number)
        return out

    agree(play(open_torch(model, "cpu")), play(on_cpu(model)))


@pytest.mark.parametrize("weight_type", [FloatType.Q40, FloatType.Q80])
@pytest.mark.parametrize("shape", [BLOCKED, BLOCKED_MOE])
def test_packed_weights_are_their_dequantised_values(tmp_path, shape, weight_type):
    model = random_model(tmp_path / "m.m", shape, weight_type)
    packed, unpacked = open_torch(model, "cpu"), open_torch(model, "cpu", "f32")
    assert weight_type.name in packed.device and "float32" in unpacked.device
    agree(several_edges(packed), several_edges(unpacked))


def test_matrices_that_are_unpacked_piece_by_piece(tmp_path, monkeypatch):
    from dllama.privatelora.backends.torch import weights

    monkeypatch.setitem(weights.TILE_VALUES, "cpu", 1000)  # ten rows of 96 and a little
    model = random_model(tmp_path / "m.m", BLOCKED, FloatType.Q40)
    agree(several_edges(open_torch(model, "cpu")), several_edges(open_torch(model, "cpu", "f32")))


@pytest.mark.parametrize("weights, off", [("f16", 0.02), ("bf16", 0.15)])
@pytest.mark.parametrize("shape", [GQA, QWEN3])
def test_half_precision_is_near(tmp_path, on_cpu, shape, weights, off):
    model = random_model(tmp_path / "m.m", shape)
    found, expected = several_edges(open_torch(model, "cpu", weights)), several_edges(on_cpu(model))
    for a, b in zip(found, expected, strict=True):
        assert np.abs(a - b).max() < off * np.abs(b).max()


def test_what_is_sent_is_a_of_x_and_nothing_where_there_is_no_a(tmp_path, on_cpu):
    model = random_model(tmp_path / "m.m", MHA)

    def sent(backend):
        lows = []
        edges = [Edge(backend, 1, shape_of(model.config, targets=("q", "v"))), Edge(backend, 2)]
        for edge in edges:
            edge.enter(3)
        stop = next(stops(edges[0].shape, edges[0].layers))
        backend.run([edge.passage for edge in edges], 0, stop, lambda sent: lows.extend(low.copy() for low in sent))
        return lows

    (found, none), (expected, _) = sent(open_torch(model, "cpu")), sent(on_cpu(model))
    assert found.dtype == np.float32 and found.shape == (3, 3, 5)
    agree([found[:, ::2]], [expected[:, ::2, :5]])
    assert not found[:, 1].any() and not none.any()


def test_the_pages_of_a_sequence_are_freed_with_it_and_leave_nothing_behind(tmp_path):
    model = random_model(tmp_path / "m.m", MHA)

    def play(backend):
        return step([Edge(backend, 1)], [70])

    expected = play(open_torch(model, "cpu"))
    backend = open_torch(model, "cpu")
    pool = backend._stack.pool
    lost = Edge(backend, 2)
    lost.enter(100)
    lost.passage.x[:] = np.nan
    backend.finish([lost.passage], 0, 2)
    n_bytes = sum(layer.nbytes for layer in pool.layers)
    assert n_bytes <= 2 * backend.sequence_bytes(100)  # and the page that is nobody's
    del lost
    assert pool.free_bytes() == backend.sequence_bytes(100)
    agree(play(backend), expected)
    assert sum(layer.nbytes for layer in pool.layers) == n_bytes


def test_a_position_outside_the_context(tmp_path):
    backend = open_torch(random_model(tmp_path / "m.m", MHA), "cpu")
    edge = Edge(backend, 1)
    edge.position = CONTEXT
    with pytest.raises(ModelError, match="position 150 is outside the context of 150 tokens"):
        step([edge], [1])


def test_there_is_room_for_so_many_adapters(tmp_path):
    backend = open_torch(random_model(tmp_path / "m.m", MHA), "cpu")
    adapter = CloudAdapter(shape_of(backend.config, 1, 1, ("q",), (0,)), 0)
    assert [backend.add(adapter, range(2)) for _ in range(MOST_ADAPTERS)] == list(range(MOST_ADAPTERS))
    with pytest.raises(LookupError, match="64 adapters already"):
        backend.add(adapter, range(2))
    backend.remove(7)
    assert backend.add(adapter, range(2)) == 7


def test_layers_that_do_not_fit(tmp_path, monkeypatch):
    model = random_model(tmp_path / "m.m", MHA)
    monkeypatch.setenv("DLLAMA_MEMORY_LIMIT", "100000")
    with pytest.raises(OutOfMemoryError, match="280 kB of memory needed for the layers on cpu.*100 kB free"):
        open_torch(model, "cpu")


def test_memory_that_the_system_refuses(tmp_path):
    backend = open_torch(random_model(tmp_path / "m.m", MHA), "cpu")
    with pytest.raises(OutOfMemoryError, match="cpu.*: out of memory in a pass: [0-9]+ bytes asked for, .* free"):
        with backend._memory_told("a pass"):
            torch.empty(1 << 60, dtype=torch.uint8)


def test_no_cuda(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    with pytest.raises(KernelError, match="--device cuda: torch .* has .*; use --device cpu"):
        open_torch(random_model(tmp_path / "m.m", MHA), "cuda")


def test_no_torch(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(KernelError, match="torch cannot be used .*: install dllama with its extra gpu"):
        open_torch(random_model(tmp_path / "m.m", MHA), "cpu")
