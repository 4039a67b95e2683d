"""The torch backend on a GPU, where graphs are captured and replayed, against the CPU's own backend."""

import threading

import numpy as np
import pytest

from dllama.formats import FloatType
from dllama.privatelora.adapter import CloudAdapter
from dllama.privatelora.backends.torch import open_torch
from tests.engine.models import BLOCKED, BLOCKED_MOE, GQA, MHA, SHAPES, random_model
from tests.privatelora.backends.edges import Edge, agree, alternately, several_edges, shape_of, step

torch = pytest.importorskip("torch", reason="needs torch")
if not torch.cuda.is_available():
    pytest.skip("needs a GPU", allow_module_level=True)


@pytest.mark.parametrize("name", SHAPES)
def test_every_architecture_with_several_edges_agrees_with_the_cpu(tmp_path, on_cpu, name):
    model = random_model(tmp_path / "m.m", SHAPES[name])
    agree(several_edges(open_torch(model, "cuda", "f32")), several_edges(on_cpu(model)))


def steps_of_fixed_shapes(backend):
    """Prompts of three edges that share an adapter, and of one with none; then tokens, by recorded graphs, while one
    edge crosses a page, one is worked alone, and another adapter takes the place of the first."""
    shared = shape_of(backend.config)
    first = Edge(backend, 1, shared)
    edges = [first, *(Edge(backend, seed, shared, number=first.number) for seed in (2, 3)), Edge(backend, 4)]
    out = step(edges[:3], (61, 5, 30)) + step(edges[3:], (1,))
    for k in range(6):
        out += step(edges[:3], (1, 1, 1), alternately if k == 2 else lambda k, edges: [edges])
        out += step(edges[k % 2 :][:2], (1, 1)) + step(edges[3:], (1,))
    del edges[:3]
    backend.remove(first.number)
    other = Edge(backend, 5, shape_of(backend.config, 12, 3))
    for _ in range(3):
        out += step([other], [1])
    return out


@pytest.mark.parametrize("name", SHAPES)
def test_recorded_graphs_say_what_the_cpu_says(tmp_path, on_cpu, name):
    model = random_model(tmp_path / "m.m", SHAPES[name])
    backend = open_torch(model, "cuda", "f32")
    agree(steps_of_fixed_shapes(backend), steps_of_fixed_shapes(on_cpu(model)))
    recorded = backend._recorder._recorded
    assert bool(recorded) == (not backend.config.arch.has_experts)


def test_mixtures_of_adapters_are_recorded_too(tmp_path, on_cpu):
    model = random_model(tmp_path / "m.m", GQA)

    def play(backend):
        shared = shape_of(model.config)
        edges = [Edge(backend, 1, shared), Edge(backend, 2, shape_of(model.config, 12, 3)), Edge(backend, 3)]
        edges.insert(1, Edge(backend, 4, shared, number=edges[0].number))
        out = step(edges, (61, 5, 30, 7))
        for k in range(4):
            out += step(edges, (1, 1, 1, 1), alternately if k == 2 else lambda k, edges: [edges])
            out += step(edges[1:], (1, 1, 1))
        return out

    backend = open_torch(model, "cuda", "f32")
    agree(play(backend), play(on_cpu(model)))
    assert backend._plan.key is not None


@pytest.mark.parametrize("weight_type", [FloatType.Q40, FloatType.Q80])
@pytest.mark.parametrize("shape", [BLOCKED, BLOCKED_MOE])
def test_packed_weights_are_near_their_values(tmp_path, shape, weight_type):
    model = random_model(tmp_path / "m.m", shape, weight_type)
    packed, exact = open_torch(model, "cuda"), open_torch(model, "cuda", "f32")
    assert weight_type.name in packed.device and torch.cuda.get_device_name() in packed.device
    far = [
        np.abs(a - b).max(1) > 0.03 * np.abs(b).max()
        for a, b in zip(several_edges(packed), several_edges(exact), strict=True)
    ]
    # In half precision a row may choose another of two experts that are about as likely.
    assert np.concatenate(far).mean() <= (0.1 if exact.config.arch.has_experts else 0)


def test_passes_and_adapters_from_other_threads(tmp_path, on_cpu):
    """Long passes are worked in a thread of their own, and adapters loaded in another, while graphs are captured."""
    model = random_model(tmp_path / "m.m", MHA)
    backend = open_torch(model, "cuda", "f32")
    edge, found = Edge(backend, 1, shape_of(model.config)), []

    def aside(pieces):
        thread = threading.Thread(target=lambda: found.extend(step([edge], pieces)))
        thread.start()
        return thread

    for pieces in ([40], [1], [1]):
        thread = aside(pieces)
        number = backend.add(CloudAdapter(shape_of(model.config), 9), range(2))
        thread.join()
        found += step([edge], [1])
        backend.remove(number)

    def alone(backend):
        edge = Edge(backend, 1, shape_of(model.config))
        return [out for n in (40, 1, 1, 1, 1, 1) for out in step([edge], [n])]

    agree(found, alone(on_cpu(model)))
