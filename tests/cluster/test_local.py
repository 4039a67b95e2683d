"""Workers on this machine: started, usable, gone at the end, and what is said of those that cannot start."""

import os
from pathlib import Path

import pytest

from dllama import Llama, SamplerSettings
from dllama.cluster.local import local_workers
from dllama.cluster.recruit import dismiss, recruit
from dllama.cluster.settings import ClusterSettings
from dllama.errors import ClusterError


def children() -> set[str]:
    return set(Path(f"/proc/self/task/{os.getpid()}/children").read_text().split())


def test_they_serve_one_root_after_another_and_are_gone_at_the_end():
    before, said = children(), []
    with local_workers(2, nthreads=1, notify=said.append) as settings:
        assert len(children() - before) == len(settings.workers) == 2
        assert settings.ratios == (1, 1, 1)
        assert settings.key is not None
        texts = []
        for _ in range(2):
            with Llama(nthreads=1, cluster=settings) as llama:
                assert len(llama.plan.nodes) == 3
                assert all(node.threads == 1 for node in llama.plan.nodes)
                pieces = llama.generate("Tom has 3 apples", 8, SamplerSettings(temperature=0))
                texts.append("".join(piece.text for piece in pieces))
    assert children() == before
    assert texts[0] == texts[1] != ""
    assert said == []


def test_they_share_the_free_memory(monkeypatch):
    monkeypatch.setenv("DLLAMA_MEMORY_LIMIT", "900000000")
    with local_workers(2, nthreads=1) as settings, Llama(nthreads=1, cluster=settings) as llama:
        assert [node.memory for node in llama.plan.nodes[1:]] == [300_000_000] * 2


def test_they_are_not_measured():
    with local_workers(1, nthreads=1) as settings:
        (worker,), errors = recruit(settings.workers, settings.key, bytes(16), 10.0)
        dismiss([worker])
    assert worker.spec.read_speed is None and not errors


def test_nodes_that_were_not_measured_go_by_their_threads_where_there_are_no_ratios(workers):
    first, second = workers(1, measured=False)[0], workers(1)[0]
    with Llama(nthreads=2, cluster=ClusterSettings((first.address, second.address), None)) as llama:
        assert [node.read_speed for node in llama.plan.nodes] == [None] * 3
        assert [len(share.heads) for share in llama.plan.shares] == [8, 4, 4]


def test_they_end_with_an_error_in_the_block_too():
    before = children()
    with pytest.raises(ZeroDivisionError), local_workers(1, nthreads=1, secure=False) as settings:
        assert settings.key is None
        raise ZeroDivisionError
    assert children() == before


def test_a_worker_that_cannot_start(monkeypatch):
    before = children()
    monkeypatch.setenv("DLLAMA_KERNELS", "mmx")
    with pytest.raises(ClusterError, match="cannot be started, it ended with exit status 1: DLLAMA_KERNELS=mmx"):
        with local_workers(1, nthreads=1):
            pass
    assert children() == before


def test_their_key_is_in_no_folder(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    with local_workers(1, nthreads=1):
        assert list(tmp_path.iterdir()) == []
