"""How workers get their slices: sent once, gone on with after a break, or taken from a copy of their own."""

import os
import shutil
import time
from types import SimpleNamespace

import pytest

from dllama import Llama, SamplerSettings
from dllama.cluster import earlier, speeds, supply, wire
from dllama.cluster.earlier import DAY
from dllama.cluster.mesh import NodeLost
from dllama.cluster.settings import ClusterSettings
from dllama.errors import ClusterError, FileError, PlanError
from dllama.formats import FloatType
from tests.cluster.checkpoints import SHAPES, VOCAB
from tests.cluster.forwarder import Forwarder
from tests.engine.models import random_model
from tests.tokenizer.models import train

SHAPE = {**SHAPES["gqa"], "dim": 1024, "hidden_dim": 4096, "n_layers": 6}
TOKENS = list(range(3, 40))


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A model of 50 MB and its tokenizer."""
    folder = tmp_path_factory.mktemp("large")
    random_model(folder / "model.m", SHAPE, FloatType.Q40).close()
    return folder / "model.m", train(folder / "tokenizer.model", vocab_size=VOCAB)


@pytest.fixture(scope="module")
def expected(files):
    with Llama(*files, nthreads=1, buffer_float_type="f32", context=64) as llama:
        return written(llama)


@pytest.fixture
def cable():
    made = []

    def lay(worker) -> Forwarder:
        assert worker.address
        made.append(Forwarder(worker.port))
        return made[-1]

    yield lay
    for one in made:
        one.close()


def written(llama) -> list[int]:
    return [piece.token_id for piece in llama.generate(TOKENS, 8, SamplerSettings(temperature=0))]


def cluster(files, *addresses, equal=True, **options) -> Llama:
    settings = ClusterSettings(addresses, None, (1,) * (1 + len(addresses)) if equal else None)
    return Llama(*files, nthreads=1, buffer_float_type="f32", context=64, cluster=settings, **options)


def test_a_slice_is_sent_once(workers, tmp_path, files, expected):
    first, second = workers(2, cache=str(tmp_path / "slices"))
    tasks = []
    for _ in range(2):
        tasks.append([])
        with cluster(
            files,
            first.address,
            second.address,
            progress=lambda task, done, total: tasks[-1].append((task, done, total)),
        ) as llama:
            assert written(llama) == expected
    sent = [figures for task, *figures in tasks[0] if task == "sending weights"]
    assert sent == sorted(sent) and sent[-1][0] == sent[-1][1] > 30_000_000
    assert "sending weights" not in {task for task, *_ in tasks[1]}


def test_a_slice_is_sent_once_though_measurements_differ(workers, tmp_path, files, expected, monkeypatch):
    """Without ratios shares go by what is measured, and that is gone by for a day, or while it is about the same."""
    # so slow that two are faster than one
    (worker,) = workers(1, cache=str(tmp_path / "slices"), speeds=(5e7, *[4.1e7] * speeds.ROUNDS, 3.9e7))
    tasks, shares, said = [], [], []
    for days, root in ((0, 4.0e7), (0.5, 1e7), (1.5, 4.2e7)):
        now = time.time() + days * DAY
        monkeypatch.setattr(speeds, "read_speed", lambda team, root=root: root)
        monkeypatch.setattr(earlier, "time", SimpleNamespace(time=lambda now=now: now))
        tasks.append([])
        told = {"progress": lambda task, *_: tasks[-1].append(task), "notify": said.append}
        with cluster(files, worker.address, equal=False, **told) as llama:
            assert written(llama) == expected
            shares.append([share.ffn_blocks for share in llama.plan.shares])
    assert said.count("measuring how fast the nodes are, all at once") == 2
    assert ["sending weights" in each for each in tasks] == [True, False, False]
    assert shares == [shares[0]] * 3 and len(shares[0]) == 2


def test_a_transfer_that_broke_off_is_gone_on_with(workers, tmp_path, files, expected, cable):
    (worker,) = workers(1, cache=str(tmp_path / "slices"))
    link = cable(worker)
    size = 0

    def break_off(task, done, total):
        nonlocal size
        size = total
        if task == "sending weights" and done > 0.9 * total and worker.alive:
            worker.kill()

    with pytest.raises(ClusterError, match=f"^worker {link.address}: the connection broke$"):
        cluster(files, link.address, progress=break_off)
    link.mend()
    worker.restart()
    before = link.passed_bytes
    with cluster(files, link.address) as llama:
        assert written(llama) == expected
    assert link.passed_bytes - before < 0.7 * size


def test_a_worker_with_a_copy_of_its_own_is_sent_nothing(workers, tmp_path, files, expected, cable):
    (worker,) = workers(1, cache=str(tmp_path / "slices"), model=str(files[0]))
    link = cable(worker)
    with cluster(files, link.address) as llama:
        assert written(llama) == expected
    assert link.passed_bytes < 5_000_000
    assert not (tmp_path / "slices").exists()


def test_a_worker_with_another_model_is_sent_its_slice(workers, tmp_path, files, expected):
    shutil.copy(files[0], tmp_path / "other.m")
    with open(tmp_path / "other.m", "r+b") as file:
        file.seek(-100, os.SEEK_END)
        file.write(b"different")
    (worker,) = workers(1, cache=str(tmp_path / "slices"), model=str(tmp_path / "other.m"))
    with cluster(files, worker.address) as llama:
        assert written(llama) == expected
    worker.said("other.m is not the root's model, so the slice comes from the root")


def test_a_worker_whose_copy_has_changed_is_sent_its_slice(workers, tmp_path, files, expected):
    copy = shutil.copy(files[0], tmp_path / "copy.m")
    (worker,) = workers(1, cache=str(tmp_path / "slices"), model=str(copy))
    address = worker.address  # it has opened the copy
    os.utime(copy, ns=(0, 0))
    with cluster(files, address) as llama:
        assert written(llama) == expected
    worker.said("copy.m has changed on disk since the start, so the slice comes from the root")


def test_a_slice_that_the_disk_may_not_take_stays_in_memory(workers, tmp_path, files, expected):
    (worker,) = workers(1, cache=str(tmp_path / "slices"), cache_limit=1_000_000)
    with cluster(files, worker.address) as llama:
        assert written(llama) == expected
    worker.said("this slice stays in memory")


def test_too_little_memory_is_told_before_anything_is_sent(workers, tmp_path, files, cable):
    (worker,) = workers(1, memory=100_000_000)
    link = cable(worker)
    with pytest.raises(PlanError) as caught:
        cluster(files, link.address)
    message = str(caught.value)
    assert f"node {link.address} needs" in message and "(100000000 bytes)" in message and "\n" not in message
    assert link.passed_bytes < 5_000_000


def test_a_model_that_changes_on_disk(workers, tmp_path, files):
    path, tokenizer = shutil.copy(files[0], tmp_path / "model.m"), files[1]
    (worker,) = workers(1)

    def touch(task, done, total):
        if task == "sending weights":
            os.utime(path, ns=(0, done))

    changed = "model.m: the model has changed on disk since it was opened; start again$"
    with pytest.raises(FileError, match=changed):
        cluster((path, tokenizer), worker.address, progress=touch)
    with cluster((path, tokenizer), worker.address) as llama:
        pieces = llama.generate(TOKENS, 8, SamplerSettings(temperature=0))
        next(pieces)
        os.utime(path)
        with pytest.raises(FileError, match=changed):
            list(pieces)


class Link:
    def send(self, frames):
        pass


class Chatter:
    """A hub whose one link always has something to say."""

    def __init__(self, link, message):
        self.received = link, message

    def receive(self, timeout_ms):
        return self.received


def test_a_silent_worker_is_noticed_however_much_another_says(monkeypatch):
    monkeypatch.setattr(supply, "SILENCE_SECONDS", 0.1)
    links = {node: Link() for node in (1, 2)}
    job = SimpleNamespace(epoch=7, message=lambda: wire.Bye())
    hub = Chatter(links[1], wire.encode(wire.Got(7, 0)))
    with pytest.raises(NodeLost, match=r"it has not been heard of for 0\.1 s") as lost:
        supply.Supply(None, hub, links, {1: job, 2: job}, (), lambda *done: None).run()
    assert lost.value.node == 2
