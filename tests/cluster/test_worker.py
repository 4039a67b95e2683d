"""A live worker's port: whom it serves, what it refuses, and that nothing that arrives there ends it."""

import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dllama import __version__
from dllama.cluster import bounds, wire
from dllama.cluster import worker as worker_module
from dllama.cluster.job import Job
from dllama.cluster.node import NodeSpec
from dllama.cluster.planner import make_plan
from dllama.cluster.transfer import CHUNK_BYTES, chunk_digest
from dllama.cluster.worker import Worker, WorkerSettings
from dllama.formats import FloatType
from tests.cluster.models import TINY
from tests.cluster.stranger import SECONDS, Stranger
from tests.cluster.test_wire import MESSAGES, packed

SESSION = bytes(range(16))
HELLO = wire.Hello(wire.PROTOCOL, __version__, SESSION, "root")

live = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
"""One worker meets all examples of a test."""


class FakeRoot(Stranger):
    """Says to a worker whatever it likes."""

    def __init__(self, worker):
        super().__init__(worker.address)
        self.epoch = 0

    def greet(self) -> wire.Welcome:
        """A worker takes a moment to let go of the root before."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            self.say(HELLO)
            answer = self.hear(wire.Welcome, wire.Refuse)
            if type(answer) is wire.Welcome:
                return answer
            assert "busy" in answer.reason or "twice" in answer.reason
            time.sleep(0.05)
        raise AssertionError("it is not free")

    def __enter__(self) -> "FakeRoot":
        return self

    def __exit__(self, *_) -> None:
        self.link.close()


@pytest.fixture
def worker(workers):
    (worker,) = workers(1)
    yield worker
    assert worker.alive, worker.lines
    with FakeRoot(worker) as root:
        root.greet()
    assert not any("Traceback" in line for line in worker.lines), worker.lines


def job(config=TINY, context=64, buffer_type=FloatType.F32) -> Job:
    """The worker's part of a plan for two nodes."""
    plan = make_plan(config, [NodeSpec("root"), NodeSpec("worker")], (1, 1), context=context, buffer_type=buffer_type)
    return Job.of_plan(plan, 1, 1, 10.0, bytes(16), "model.m")


def plan_values() -> dict:
    return job().message().plan


def test_a_root_of_another_version_is_refused(worker):
    with FakeRoot(worker) as root:
        root.say(HELLO._replace(version="0.0.1"))
        reason = root.hear(wire.Refuse).reason
        assert f"runs dllama {__version__} and the root 0.0.1: install the same on both" in reason


def test_a_root_of_another_protocol_is_refused(worker):
    with FakeRoot(worker) as root:
        root.say(HELLO._replace(protocol=wire.PROTOCOL + 1))
        assert f"speaks protocol {wire.PROTOCOL + 1}" in root.hear(wire.Refuse).reason


def test_a_second_root_has_to_wait(worker):
    with FakeRoot(worker) as first:
        first.greet()
        with FakeRoot(worker) as second:
            second.say(HELLO._replace(session=bytes(16)))
            assert second.hear(wire.Refuse).reason == "this worker is busy with another root; try again later"
            first.say(wire.Probe(7), b"x")
            assert first.hear(wire.Probe) == wire.Probe(7), "the first one is served as before"


def test_a_worker_given_twice_says_so(worker):
    with FakeRoot(worker) as first, FakeRoot(worker) as second:
        first.greet()
        second.say(HELLO)
        assert "the same worker is given twice" in second.hear(wire.Refuse).reason


def test_a_worker_that_has_said_goodbye_is_free(worker):
    for session in map(bytes, ([number] * 16 for number in range(20))):
        with FakeRoot(worker) as root:
            root.say(HELLO._replace(session=session))
            assert type(root.hear(wire.Welcome, wire.Refuse)) is wire.Welcome
            root.say(wire.Bye())
            assert root.hear(wire.Bye) == wire.Bye()


def test_an_idle_worker_measures_itself_again_and_tells_the_best(workers):
    (worker,) = workers(1, idle_seconds=0.1, speeds=(4e9, 3e9, 5e9, 2e9, 2e9, 2e9))
    told, end = [], time.monotonic() + SECONDS
    while told[-1:] != [2e9] and time.monotonic() < end:
        with FakeRoot(worker) as root:
            told.append(root.greet().read_speed)
            root.say(wire.Bye())
            root.hear(wire.Bye)
        time.sleep(0.2)
    # A root that comes before the next measurement is told the last again.
    assert list(dict.fromkeys(told)) == [4e9, 5e9, 2e9]


def test_a_worker_measures_itself_when_the_root_says_so(workers):
    (worker,) = workers(1, speeds=(4e9, 3e9, 2e9))
    with FakeRoot(worker) as root:
        assert root.greet().read_speed == 4e9
        for number, speed in enumerate((3e9, 2e9)):
            root.say(wire.Measure(1, number))
            assert root.hear(wire.Measured) == wire.Measured(1, number, speed)
        root.say(wire.Bye())
        root.hear(wire.Bye)
        assert root.greet().read_speed == 4e9, "what it measures together with others is none of its own"


def test_an_idle_worker_does_not_measure_itself_while_an_earlier_load_has_its_threads(cache, monkeypatch):
    monkeypatch.setattr(worker_module, "read_speed", lambda team: 4e9)
    worker = Worker(WorkerSettings("127.0.0.1", 0, None, 1, cache=cache), notify=lambda line: None)
    loaded = threading.Event()
    load = worker._preparation._thread = threading.Thread(target=loaded.wait, args=(60,))
    try:
        load.start()
        worker._measure()
        assert list(worker._speeds) == [4e9], "that of its start"
        loaded.set()
        load.join()
        worker._measure()
        assert list(worker._speeds) == [4e9] * 2
    finally:
        loaded.set()
        worker._listener.close()
        worker._team.close()


def test_a_root_may_have_nodes_measured_again_while_a_plan_is_prepared(worker):
    task = job(replace(TINY, dim=512, hidden_dim=1984, n_layers=8, weight_type=FloatType.F32))
    with FakeRoot(worker) as root:
        root.greet()
        message = task.message()
        root.say(message)
        root.hear(wire.Need)
        supply(root, message, task.layout)
        root.hear(wire.Loading)
        root.say(wire.Measure(message.epoch + 1, 0))
        assert root.hear(wire.Measured, wire.Refuse)[:2] == (message.epoch + 1, 0)
        root.epoch = message.epoch + 1
        ready(root, job(replace(TINY, n_layers=1)))


def test_workers_of_another_session_get_no_answer(worker):
    with FakeRoot(worker) as root, FakeRoot(worker) as stranger, FakeRoot(worker) as friend:
        root.greet()
        stranger.say(wire.Join(bytes(16), 1, 2))
        friend.say(wire.Join(SESSION, 1, 2))
        assert friend.hear(wire.Joined) == wire.Joined(1, 2)
        assert stranger.hear(wire.Joined, seconds=0.2) is None


def test_steps_without_a_plan_are_nothing(worker):
    with FakeRoot(worker) as root:
        root.greet()
        root.say(wire.Step(1, 1, ((0, 0, 1, -1),), (0,), (0.0, 0, 0.0, 0.0, 1.0, ()), ()), bytes(400))
        root.say(wire.Chunk(1, 0, bytes(16)), b"data")
        root.say(wire.Probe(1), b"x")
        assert root.hear(wire.Probe, wire.Refuse) == wire.Probe(1)


def test_a_plan_for_which_the_memory_is_too_small(workers):
    (worker,) = workers(1, memory=100_000_000)
    with FakeRoot(worker) as root:
        assert root.greet().free_memory == 100_000_000
        root.say(job().message())
        answer = root.hear(wire.Refuse, wire.Need)
        assert (
            answer.reason.startswith("not enough memory: its share needs 15") and "(100000000 bytes)" in answer.reason
        )


def supply(root: FakeRoot, message: wire.Plan, layout) -> None:
    """Gives a worker all chunks of a slice of random bytes that are numbers all the same."""
    stream = np.random.default_rng(0).standard_normal(layout.nbytes // 4 + 1).astype(np.float32).view(np.uint8)
    for index, first in enumerate(range(0, layout.nbytes, CHUNK_BYTES)):
        chunk = stream[first : min(first + CHUNK_BYTES, layout.nbytes)].tobytes()
        root.say(wire.Chunk(message.epoch, index, chunk_digest(chunk)), chunk)


def ready(root: FakeRoot, task: Job) -> None:
    """A worker made ready for a job."""
    root.epoch += 1
    message = task.message()._replace(epoch=root.epoch)
    root.say(message)
    need = root.hear(wire.Need, wire.Refuse)
    assert type(need) is wire.Need, need
    if not need.has_all:
        supply(root, message, task.layout)
    assert root.hear(wire.Ready, wire.Refuse) is not None


@pytest.mark.parametrize("moment", ["planned", "supplied", "loading", "ready"])
def test_a_root_that_goes_while_the_worker_gets_ready(worker, moment):
    task = job(replace(TINY, dim=512, hidden_dim=2048, n_layers=8, weight_type=FloatType.F32))
    with FakeRoot(worker) as root:
        root.greet()
        message = task.message()
        root.say(message)
        if moment != "planned":
            root.hear(wire.Need)
            supply(root, message, task.layout)
            kind = {"supplied": wire.Got, "loading": wire.Loading, "ready": wire.Ready}[moment]
            assert root.hear(kind) is not None
    with FakeRoot(worker) as root:
        root.greet()
        ready(root, job(replace(TINY, n_layers=1)))


def test_a_plan_that_comes_while_another_is_prepared(worker):
    with FakeRoot(worker) as root:
        root.greet()
        for dim in (512, 480, 448):
            task = job(replace(TINY, dim=dim, hidden_dim=2048, n_layers=4))
            root.epoch += 1
            message = task.message()._replace(epoch=root.epoch)
            root.say(message)
            if type(root.hear(wire.Need)) is wire.Need:
                supply(root, message, task.layout)
        ready(root, job(replace(TINY, n_layers=1)))
        assert root.hear(wire.Refuse, seconds=0.1) is None


INTEGERS = st.one_of(st.integers(-2, 300), st.integers(0, 1 << 33))
VALUES = st.one_of(
    INTEGERS, st.floats(), st.booleans(), st.none(), st.text(max_size=5), st.binary(max_size=20), st.lists(INTEGERS)
)


def test_plans_that_make_no_sense(worker):
    """Whatever the plan: it is refused, or it is one, and the slice is asked for."""
    with FakeRoot(worker) as root:
        root.greet()

        @live
        @given(data=st.data())
        def meet(data):
            plan = plan_values()
            for _ in range(data.draw(st.integers(1, 3))):
                where = data.draw(st.sampled_from(("config", "shares", "other")))
                if where == "config":
                    field = data.draw(st.sampled_from(sorted(plan["config"])))
                    plan["config"][field] = data.draw(VALUES)
                elif where == "shares":
                    node, part, end = (data.draw(st.integers(0, size)) for size in (1, 3, 1))
                    plan["shares"][node][part][end] = data.draw(VALUES)
                else:
                    field = data.draw(st.sampled_from(sorted(set(plan) - {"config", "shares", "index", "addresses"})))
                    plan[field] = data.draw(VALUES)
            root.epoch += 1
            root.say(wire.Plan(root.epoch, plan))
            assert root.hear(wire.Refuse, wire.Need) is not None

        meet()


def test_steps_that_make_no_sense(worker):
    """Whatever the step: it is refused, or it is one, and its candidates come."""
    task = job(replace(TINY, n_layers=1))
    part = bytes(4 * TINY.dim)
    with FakeRoot(worker) as root:
        root.greet()
        ready(root, task)
        steps = iter(range(1, 1 << 30))

        def step(rows, wanted, reduction, freed, payload):
            number = next(steps)
            count = sum(run[2] for run in rows)
            root.say(wire.Step(root.epoch, number, rows, wanted, reduction, freed), payload)
            for round in range(2):
                root.say(wire.Part(root.epoch, number, round), part * max(1, min(count, 128)))
            return root.hear(wire.Candidates, wire.Refuse)

        sound = ((3, 0, 2, -1), (4, 0, 1, -1)), (0, 2), (0.8, 4, 0.0, 0.0, 1.0, ()), (7,), part * 3
        assert type(step(*sound)) is wire.Candidates

        @live
        @given(data=st.data())
        def meet(data):
            rows, wanted, reduction, freed, payload = map(list, sound)
            damage = data.draw(st.sampled_from(("rows", "wanted", "reduction", "payload", "nothing")))
            number = st.one_of(st.integers(0, 70), st.integers(0, 1 << 25))
            if damage == "rows":
                rows = data.draw(st.lists(st.tuples(st.integers(0, 9), number, number, st.integers(-1, 2)), max_size=5))
            elif damage == "wanted":
                wanted = data.draw(st.lists(number, max_size=5))
            elif damage == "reduction":
                at = data.draw(st.integers(0, 5))
                reduction[at] = data.draw(st.one_of(VALUES, st.floats(0, 2), st.lists(number)))
            elif damage == "payload":
                payload = data.draw(st.binary(max_size=2000))
            assert step(rows, wanted, reduction, freed, bytes(payload)) is not None
            ready(root, task)

        meet()


RANK_4 = ((4,) * 7,)
"""Of one adapter to one layer."""


def test_adapters_count_as_memory(workers):
    task = job(replace(TINY, n_layers=1))
    (worker,) = workers(1, memory=task.memory_bytes)
    with FakeRoot(worker) as root:
        root.greet()
        ready(root, task)
        root.say(replace(task, epoch=root.epoch + 1, adapters=RANK_4).message())
        assert root.hear(wire.Refuse, wire.Need).reason.startswith("not enough memory: its share needs ")


@pytest.mark.parametrize("damage", [0, 1 << 19])
def test_adapters_that_arrive_damaged(worker, damage):
    """Another digest than the bytes have, or bytes too many."""
    task = replace(job(replace(TINY, n_layers=1)), adapters=RANK_4)
    with FakeRoot(worker) as root:
        root.greet()
        root.epoch = task.epoch
        root.say(task.message())
        if not root.hear(wire.Need).has_all:
            supply(root, task.message(), task.layout)
        assert root.hear(wire.NeedAdapters, wire.Refuse) == wire.NeedAdapters(task.epoch)
        chunk = bytes(damage or 64)
        root.say(wire.Chunk(task.epoch, 0, chunk_digest(chunk) if damage else bytes(16)), chunk)
        assert root.hear(wire.Refuse, wire.Got).reason == "a chunk of the adapters arrived damaged"
        ready(root, job(replace(TINY, n_layers=1)))


@pytest.mark.parametrize("adapters", [((4,) * 6,), ((4,) * 7, ())])
def test_adapters_of_another_shape(worker, adapters):
    with FakeRoot(worker) as root:
        root.greet()
        root.say(replace(job(replace(TINY, n_layers=1)), adapters=adapters).message())
        reason = root.hear(wire.Refuse, wire.Need).reason
        assert reason == "the plan makes no sense: an adapter has a rank for each target of each layer"


def test_parts_of_a_wrong_size(worker):
    task = job(replace(TINY, n_layers=1))
    with FakeRoot(worker) as root:
        root.greet()
        ready(root, task)
        root.say(wire.Step(root.epoch, 1, ((0, 0, 1, -1),), (), (0.0, 0, 0.0, 0.0, 1.0, ()), ()), bytes(4 * TINY.dim))
        root.say(wire.Part(root.epoch, 1, 0), bytes(7))
    worker.said("the root is lost: ")


@pytest.mark.parametrize(
    "noise",
    [b"", b"\0", b"GET / HTTP/1.1\r\nHost: worker\r\n\r\n", b"\xff" + bytes(8) + b"\x7f", bytes(range(256)) * 999],
)
def test_other_programs(worker, noise):
    with socket.create_connection(("127.0.0.1", worker.port)) as connection, suppress(OSError):  # it is dropped
        connection.sendall(noise)
        connection.shutdown(socket.SHUT_WR)


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)


@live
@given(noise=st.binary(max_size=300), greeting=st.sampled_from((b"", GREETING[:10], GREETING)))
def test_random_bytes(worker, noise, greeting):
    with socket.create_connection(("127.0.0.1", worker.port)) as connection, suppress(OSError):
        connection.sendall(greeting + noise)


@live
@given(frames=st.lists(st.binary(max_size=60), min_size=1, max_size=4))
def test_random_frames(worker, frames):
    with FakeRoot(worker) as root:
        root.link.send(frames)
        root.hear(wire.Refuse, seconds=0.02)


@live
@given(data=st.data())
def test_damaged_messages(worker, data):
    """From strangers, and from the root itself."""
    with FakeRoot(worker) as root:
        if data.draw(st.booleans()):
            root.greet()
        for _ in range(3):
            header, *payload = packed(data.draw(st.sampled_from(MESSAGES)))
            header = bytearray(header)
            for _ in range(data.draw(st.integers(0, 3))):
                header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
            root.link.send([bytes(header), *payload])
        root.hear(wire.Refuse, seconds=0.02)


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_any_message_at_any_time(worker, message):
    """Before a plan, with one that is being prepared, and with one that is ready."""
    task = job(replace(TINY, n_layers=1))
    for prepare in (lambda root: None, FakeRoot.greet, partial(_prepared, task=task)):
        with FakeRoot(worker) as root:
            prepare(root)
            root.say(message, *([b"payload"] if bounds.SCHEMA[type(message)].payload else []))
            root.hear(wire.Refuse, seconds=0.05)


def _prepared(root: FakeRoot, task: Job) -> None:
    root.greet()
    ready(root, task)
