"""A live worker that runs a stack's passes for a root: what it does with sound ones, and with others."""

from dataclasses import replace

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from dllama.cluster import wire
from dllama.cluster.job import Job
from dllama.privatelora.frozen_weights import MOST_ADAPTERS
from tests.cluster.models import TINY
from tests.cluster.test_worker import FakeRoot, job, live, ready

RANKS = 4, 3
SEEDED = {
    "r_c2d": RANKS[0], "r_d2c": RANKS[1], "targets": ("q", "o"), "layers": (0,), "seed": 7, "worked": (0, 1),
}  # fmt: skip
QKV, OUT, END = (0, 0), (0, 1), (1, -1)


@pytest.fixture
def task() -> Job:
    return replace(job(replace(TINY, n_layers=1)), stack=True)


@pytest.fixture
def root(workers, task):
    """One whose worker is ready for the task."""
    (worker,) = workers(1)
    with FakeRoot(worker) as root:
        root.greet()
        ready(root, task)
        yield root
    assert worker.alive, worker.lines
    assert not any("Traceback" in line for line in worker.lines), worker.lines


def adapted(root: FakeRoot, number: int, adapter: dict = SEEDED) -> wire.Adapted:
    """What it says of an adapter."""
    root.say(wire.Adapt(root.epoch, number, adapter))
    answer = root.hear(wire.Adapted, wire.Refuse)
    assert answer.number == number
    return answer


def enter(root: FakeRoot, step: int, **changes) -> None:
    """Three rows of two passages, to the stop at q, k and v."""
    rows = ((1, 0, 2, 64), (2, 0, 1, 32))
    message = wire.Pass(root.epoch, step, (0, -1), QKV, ((8, 5, 2), (9, 5, 1)), rows, (), ())
    payload = changes.pop("payload", bytes(3 * 4 * TINY.dim))
    root.say(message._replace(**changes), payload)


def go_on(root: FakeRoot, step: int, start=QKV, stop=OUT, **changes) -> None:
    """The same passages, answered, to the next stop."""
    targets = 3 if start == QKV else 1
    message = wire.Pass(root.epoch, step, start, stop, ((8, 5, 2), (9, 5, 1)), (), (), ())
    payload = changes.pop("payload", bytes(3 * 4 * targets * RANKS[1]))
    root.say(message._replace(**changes), payload)


def give_parts(root: FakeRoot, step: int, low: bool = True) -> None:
    """The root's parts of A·x and of a product."""
    if low:
        root.say(wire.Part(root.epoch, step + 1, 0), bytes(3 * 4 * RANKS[0]))
    root.say(wire.Part(root.epoch, step, 0), bytes(3 * 4 * TINY.dim))


def test_passes_that_come_all_at_once(root):
    """A root waits for none of them: the worker does one after the other, and says its parts in their order."""
    assert adapted(root, 5) == wire.Adapted(root.epoch, 5, None)
    enter(root, 2)
    go_on(root, 4)
    go_on(root, 6, OUT, END)
    enter(root, 8, freed=(1,), stop=OUT)
    for step, low in ((4, True), (6, False), (8, True)):
        give_parts(root, step, low)
    found = [root.hear(wire.Part, wire.Refuse) for _ in range(5)]
    assert [(part.step, part.round) for part in found] == [(5, 0), (4, 0), (6, 0), (9, 0), (8, 0)]


def test_as_many_adapters_as_there_is_room_for(root):
    problems = [adapted(root, number).problem for number in range(MOST_ADAPTERS + 1)]
    assert not any(problems[:-1])
    assert problems[-1] == "the cloud has 64 adapters already, and room for no more"
    root.say(wire.Adapt(root.epoch, 7, None))
    assert adapted(root, 100).problem is None


@pytest.mark.parametrize(
    "wrong, problem",
    [
        ({"layers": (1,)}, "its layers are not those of a model of 1"),
        ({"targets": ()}, "no target, or no layer"),
        ({"r_d2c": TINY.dim + 1}, f"an adapter of rank {TINY.dim + 1}, and the model is {TINY.dim} wide"),
    ],
)
def test_an_adapter_that_cannot_be(root, wrong, problem):
    assert adapted(root, 1, SEEDED | wrong).problem == problem
    assert adapted(root, 1).problem is None


def test_a_plan_that_comes_in_the_middle_of_a_pass(root, task):
    """And after others that will not be done."""
    assert adapted(root, 5).problem is None
    enter(root, 2)
    go_on(root, 4)
    go_on(root, 6, OUT, END)
    enter(root, 8)
    root.say(wire.Probe(1), b"x")
    assert root.hear(wire.Probe) == wire.Probe(1), "it waits for a part, and has heard all this"
    ready(root, replace(job(replace(TINY, n_layers=1, hidden_dim=160)), stack=True))
    assert adapted(root, 5).problem is None
    enter(root, 2)
    go_on(root, 4)
    assert root.hear(wire.Part, wire.Refuse).epoch == root.epoch


def test_what_is_not_for_a_stack(root, task):
    root.say(wire.Step(root.epoch, 1, ((0, 0, 1, -1),), (), (0.0, 0, 0.0, 0.0, 1.0, ()), ()), bytes(4 * TINY.dim))
    assert adapted(root, 5).problem is None
    ready(root, replace(task, stack=False))
    enter(root, 2)
    root.say(wire.Adapt(root.epoch, 5, SEEDED))
    root.say(wire.Probe(1), b"x")
    assert root.hear(wire.Adapted, wire.Refuse, wire.Probe) == wire.Probe(1)


NUMBERS = st.one_of(st.integers(-1, 9), st.sampled_from((63, 64, 65, 128, 1 << 20)))
PLACES = st.tuples(st.integers(0, 3), st.integers(-1, 3))
PASSAGE = st.tuples(st.sampled_from((8, 9, 10)), st.sampled_from((-1, 5, 6)), st.integers(1, 200))
RUNS = st.lists(st.tuples(st.integers(0, 3), NUMBERS, NUMBERS, NUMBERS), max_size=3)
DAMAGE = {
    "start": PLACES,
    "stop": PLACES,
    "passages": st.lists(PASSAGE, max_size=3),
    "rows": RUNS,
    "payload": st.binary(max_size=2000),
}


def test_passes_that_make_no_sense(root, task):
    """Whatever the pass: it is refused, or it is one."""

    @live
    @given(changes=st.fixed_dictionaries({}, optional=DAMAGE), enters=st.booleans())
    @example(changes={"stop": (0, 3)}, enters=True)  # its adapters are elsewhere
    def meet(changes, enters):
        ready(root, task)
        assert adapted(root, 5).problem is None
        if enters:
            enter(root, 2, **changes)
        else:
            enter(root, 2)
            go_on(root, 4, **changes)
        for step in (2, 4):
            give_parts(root, step)
        root.say(wire.Probe(1), b"x")
        assert root.hear(wire.Probe) == wire.Probe(1)

    meet()


def test_an_answer_that_is_too_short_is_refused(root):
    assert adapted(root, 5).problem is None
    enter(root, 2)
    go_on(root, 4, payload=bytes(40))
    assert root.hear(wire.Refuse).reason.startswith("the step cannot be run: ")
