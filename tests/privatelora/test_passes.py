"""Passes through a live cloud: of several edges at once, and those that take long."""

import threading
import time

import numpy as np

from dllama.errors import OutOfMemoryError
from dllama.privatelora.adapter import write_adapter
from tests.privatelora.adapters import strong_halves
from tests.privatelora.fake_edge import FakeEdge
from tests.privatelora.nodes import CloudThread, edge, run
from tests.privatelora.served import TOKENS


def test_a_long_pass_of_one_edge_is_no_death_to_the_others(served, cloud):
    """Neither to one that wants a step, nor to one that comes."""
    _, model, folder, _, expected = served
    working, lines = threading.Event(), []

    def slow() -> None:
        if sum(cloud.backend.groups[-1]) > 100:
            working.set()
            time.sleep(4.0)

    def work() -> None:
        with edge(model, cloud.address, lines.append, step_timeout=2.0) as engine:
            run(engine, [1] * 128)

    with edge(model, cloud.address, lines.append, adapter=folder, step_timeout=2.0) as engine:
        sequence = engine.sequence()
        found = [run(engine, TOKENS[:2], sequence)]
        cloud.backend.before = slow
        thread = threading.Thread(target=work)
        thread.start()
        working.wait()
        found.append(run(engine, TOKENS[2:], sequence, 2))
        working.clear()
        thread.join()
        thread = threading.Thread(target=work)
        thread.start()
        working.wait()
        with edge(model, cloud.address, lines.append, step_timeout=2.0) as newcomer:
            assert np.isfinite(run(newcomer, [1])).all()
        thread.join()
    cloud.backend.before = lambda: None
    assert abs(np.concatenate(found) - expected).max() < 1e-4 * abs(expected).max()
    assert not any("is lost" in line for line in lines), lines


def test_an_edge_that_goes_in_the_middle_of_a_long_pass(served, cloud):
    """Its adapter is in use until the pass has ended."""
    _, model, _, half, _ = served
    working, adapters = threading.Event(), []

    def slow() -> None:
        working.set()
        time.sleep(2.0)
        adapters.extend(cloud.backend.adapters)

    since = len(cloud.lines)
    with FakeEdge(cloud.address, model, half) as one:
        one.open()
        cloud.backend.before = slow
        one.enter(rows=((0, 0, 100),))
        working.wait()
    cloud.said("the connection broke", since)
    cloud.backend.before = lambda: None
    assert len(adapters) == 1


def test_an_error_in_a_shared_pass_ends_no_edge(served):
    _, model, folder, _, expected = served

    def before() -> None:
        time.sleep(0.02)
        if len(cloud.backend.groups[-1]) > 1:
            raise OutOfMemoryError("too much at once")

    def write(adapter, found) -> None:
        with edge(model, cloud.address, adapter=adapter) as engine:
            all_here.wait()  # on a busy machine one could be done before another comes
            sequence = engine.sequence()
            found += [run(engine, [token], sequence, i)[0] for i, token in enumerate(TOKENS)]

    with CloudThread(model.path) as cloud:
        cloud.backend.before = before
        texts = [], [], []
        all_here = threading.Barrier(len(texts), timeout=60)
        threads = [threading.Thread(target=write, args=(folder, text)) for text in texts]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert max(map(len, cloud.backend.groups)) > 1, "there was none"
        cloud.said("this cloud is busy: a pass for")
    for text in texts:
        assert abs(np.array(text) - expected).max() < 1e-4 * abs(expected).max()


def test_edges_at_once_get_what_each_gets_alone(served, cloud, tmp_path):
    """Two adapters and none, prompts of three lengths; each edge has a thread, and rows of several are run together."""
    _, model, folder, _, _ = served
    pair = strong_halves(model.config, ("q", "v", "down"), ranks=(4, 12), seed=8, m_seed=5)
    write_adapter(tmp_path, *pair)
    adapters = [folder, tmp_path, tmp_path]
    texts = [np.random.default_rng(seed).integers(0, 70, 14 + seed).tolist() for seed in range(3)]

    def write(adapter, text) -> np.ndarray:
        with edge(model, cloud.address, adapter=adapter) as engine:
            sequence = engine.sequence()
            start.wait()
            prompt = run(engine, text[:5], sequence)
            others = [run(engine, text[i : i + 1], sequence, i) for i in range(5, len(text))]
            return np.concatenate([prompt, *others])

    cloud.backend.groups.clear()
    start = threading.Barrier(1)
    alone = [write(*pair) for pair in zip(adapters, texts, strict=True)]
    assert max(map(len, cloud.backend.groups)) == 1
    start = threading.Barrier(3)
    together = [None] * 3

    def note(i) -> None:
        together[i] = write(adapters[i], texts[i])

    cloud.backend.before = lambda: time.sleep(0.01)  # as long as an edge takes for its answer, where weights are many
    cloud.backend.groups.clear()
    threads = [threading.Thread(target=note, args=(i,)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cloud.backend.before = lambda: None
    for one, other in zip(together, alone, strict=True):
        assert abs(one - other).max() < 1e-5 * abs(other).max()
    shared = sum(len(group) for group in cloud.backend.groups if len(group) > 1)
    assert shared > sum(map(len, cloud.backend.groups)) / 2, "rows of several edges are run together"
    cloud.backend.groups.clear()
