"""Which passages are taken on next: nobody starves, and those at the same place go together."""

from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllama.engine.workspace import MAX_ROWS
from dllama.privatelora.passage import Stop
from dllama.privatelora.schedule import LEAST_HOPE, Costs, choose

STOPS = [Stop(0, 0), Stop(0, 1), Stop(1, 0)]
LAYERS = 2
COSTS = Costs(pass_seconds=1.0, step_seconds=6.0)


@dataclass(eq=False)
class Edge:
    """What `choose` looks at of a session. at: how many stops it has been to, None between steps."""

    at: int | None = None
    ready_at: float | None = None
    rows: int = 1  # of its step
    left_at: float = -1e9
    hope: float = 1.0
    stops: list = field(default_factory=lambda: STOPS)
    set_out_at: float = 0.0
    seconds: float = 0.0

    @property
    def passed(self):
        return self.at

    @property
    def passes_ahead(self):
        return len(self.stops) + 1 - self.at

    @property
    def passages(self):
        return [] if self.at is None else [None] * -(-self.rows // MAX_ROWS)

    @property
    def came_from(self):
        return self.stops[self.at - 1] if self.at else 0

    @property
    def goes_to(self):
        return self.stops[self.at] if self.at is not None and self.at < len(self.stops) else LAYERS


def test_one_alone_does_not_wait():
    one = Edge(0, ready_at=5.0)
    assert choose([one], COSTS, 5.0) == ([one], None)


def test_nobody_is_ready():
    assert choose([], COSTS, 5.0) == ([], None)
    assert choose([Edge(), Edge(2)], COSTS, 5.0) == ([], None)


def test_those_at_the_same_place_go_together():
    edges = [Edge(1, 5.0), Edge(2, 5.0), Edge(1, 5.0), Edge(1, 5.0, stops=[STOPS[0], STOPS[2]])]
    assert choose(edges, COSTS, 5.0) == ([edges[0], edges[2]], None)
    assert choose(edges[1:], COSTS, 5.0)[0] == [edges[1]]


def test_no_more_rows_than_a_pass_takes():
    edges = [Edge(1, 5.0, rows=100), Edge(1, 5.1, rows=20), Edge(1, 5.2, rows=20), Edge(1, 5.3, rows=8)]
    assert choose(edges, COSTS, 6.0)[0] == edges[:2]
    assert choose([Edge(1, 5.0, rows=MAX_ROWS), *edges], COSTS, 6.0)[0][0].rows == MAX_ROWS


def test_an_edge_that_owes_the_answer_is_waited_for_as_long_as_a_pass_takes():
    ready, late = Edge(1, 5.0), Edge(1)
    assert choose([ready, late], COSTS, 5.2) == ([], pytest.approx(0.8))
    assert choose([ready, late], COSTS, 6.0) == ([ready], None)


def test_one_at_another_place_is_not_waited_for():
    for other in (Edge(2), Edge(0), Edge(None)):
        ready = Edge(1, 5.0)
        assert choose([ready, other], COSTS, 5.0) == ([ready], None)


def test_hope_halves_and_returns():
    ready, late = Edge(1, 5.0), Edge(1)
    for waited in (1.0, 0.5, 0.25, 0.125, 1 / 16, 1 / 32, 1 / 64, 1 / 64):
        assert choose([ready, late], COSTS, 5.0 + 0.9 * waited) == ([], pytest.approx(0.1 * waited))
        assert choose([ready, late], COSTS, 5.0 + waited) == ([ready], None)
    assert late.hope == LEAST_HOPE and ready.hope == 1.0
    late.ready_at = 5.0
    assert choose([ready, late], COSTS, 5.0) == ([ready, late], None)
    assert late.hope == 1.0


def test_hope_grows_with_every_step_but_not_with_its_begin():
    one, other = Edge(0, 5.0), Edge(0, 5.0, hope=0.25)
    assert choose([one, other], COSTS, 5.0) == ([one, other], None) and other.hope == 0.25
    for _ in range(2):
        Costs().ended(other)
    assert other.hope == pytest.approx(0.5)
    for _ in range(3):
        Costs().ended(other)
    assert other.hope == 1.0
    whole = [Edge(0, 5.0, stops=[]), Edge(0, 5.0, stops=[], hope=0.25)]  # a step without stops
    assert choose(whole, COSTS, 5.0) == (whole, None) and whole[1].hope == 1.0


def test_who_enters_waits_for_those_on_their_way_and_those_about_to_come():
    for other in (Edge(2, set_out_at=6.0), Edge(2, 9.9, set_out_at=6.0), Edge(None, left_at=8.0)):
        entering = Edge(0, 9.0)
        group, wait = choose([entering, other], COSTS, 10.0)
        assert (group == [other]) if other.ready_at else (wait == pytest.approx(5.0))
        assert choose([entering, other], COSTS, 15.1)[0] in ([entering], [other])
    gone = Edge(None, left_at=3.0)  # its next step is overdue
    assert choose([entering, gone], COSTS, 10.0) == ([entering], None)
    slow = Edge(1, set_out_at=7.0)  # three seconds a stop, and three to go
    assert choose([entering, slow], COSTS, 10.0) == ([entering], None)
    hopeless = Edge(2, set_out_at=6.0, hope=0.25)  # it is expected later than it is waited for
    assert choose([entering, hopeless], COSTS, 10.0) == ([entering], None)


def test_a_full_group_does_not_wait():
    edges = [Edge(1, 5.0, rows=100), Edge(1, 5.0, rows=28), Edge(1)]
    assert choose(edges, COSTS, 5.0) == (edges[:2], None)


def test_costs_are_averages():
    costs = Costs()
    for _ in range(60):
        costs.passed(2.0)
        costs.ended(Edge(seconds=8.0))
    assert costs.pass_seconds == pytest.approx(2.0, rel=1e-3) and costs.step_seconds == pytest.approx(8.0, rel=1e-3)


EDGES = st.builds(
    Edge,
    at=st.integers(0, 3) | st.none(),
    rows=st.integers(1, 2 * MAX_ROWS),
    left_at=st.floats(0, 10),
    hope=st.sampled_from([1.0, 0.25, LEAST_HOPE]),
    stops=st.sampled_from([STOPS, STOPS[:1], []]),
)


@given(st.lists(EDGES, max_size=6), st.data())
def test_whatever_the_edges_do(edges, data):
    """A group is at one place, has no more rows than fit and nobody waits for longer than what a step costs."""
    now = 10.0
    for edge in edges:
        if edge.at is not None:
            edge.at = min(edge.at, len(edge.stops))
            edge.ready_at = data.draw(st.none() | st.floats(0, now))
    group, wait = choose(edges, COSTS, now)
    ready = [edge for edge in edges if edge.ready_at is not None]
    if not group:
        assert (wait is None) == (not ready)
        for edge in ready:
            patience = COSTS.pass_seconds if edge.at else COSTS.step_seconds
            assert 0 < wait and now - edge.ready_at < patience
        return
    assert wait is None and set(group) <= set(ready)
    assert len({(edge.came_from, edge.goes_to) for edge in group}) == 1
    assert len(group) == 1 or sum(edge.rows for edge in group) <= MAX_ROWS
    assert len(set(group)) == len(group)
    overdue = [edge for edge in ready if now - edge.ready_at >= (COSTS.pass_seconds if edge.at else COSTS.step_seconds)]
    if overdue:
        assert min(edge.ready_at for edge in group) <= min(edge.ready_at for edge in overdue)


@given(st.lists(st.lists(st.floats(0, 3), min_size=4, max_size=4), min_size=1, max_size=4))
def test_every_edge_gets_through(delays):
    """Edges that answer after some time, whatever that is: none is stuck, and none waits for longer than it may."""
    edges = [Edge(0, ready_at=float(number)) for number in range(len(delays))]
    due: list[tuple[float, Edge]] = []
    now, steps = 0.0, 0
    while any(edge.at is not None for edge in edges):
        for moment, edge in due:
            if moment <= now:
                edge.ready_at = moment
        due = [(moment, edge) for moment, edge in due if moment > now]
        visible = [edge for edge in edges if edge.ready_at is None or edge.ready_at <= now]
        group, wait = choose(visible, COSTS, now)
        for edge in group:
            patience = COSTS.pass_seconds if edge.at else COSTS.step_seconds
            assert now - edge.ready_at <= patience + len(edges) * COSTS.pass_seconds, "others' passes, and its own wait"
            edge.ready_at = None
            if edge.at == len(edge.stops):
                edge.at, edge.left_at = None, now + COSTS.pass_seconds
            else:
                due.append((now + COSTS.pass_seconds + delays[edges.index(edge)][edge.at], edge))
                edge.at += 1
        coming = [moment for moment, _ in due] + [edge.ready_at for edge in edges if edge not in visible]
        limits = [moment - now for moment in coming if moment > now] + ([wait] if wait is not None else [])
        now += COSTS.pass_seconds if group else min(limits) + 1e-9
        steps += 1
        assert steps < 200


@dataclass(eq=False)
class Writer(Edge):
    """An edge that writes without end. comes: when its prompt does; answer: seconds until it has answered, and until
    it begins the next step; steps: of each, whether it had company all the way."""

    comes: float = 0.0
    answer: float = 0.1
    stops: list = field(default_factory=lambda: [Stop(layer, 0) for layer in range(20)])
    steps: list = field(default_factory=list)


def let_write(writers, seconds):
    """A pass takes a second for one row, and 0.3 more for each beside it."""
    due, costs, now = {id(edge): edge.comes for edge in writers}, Costs(), 0.0
    while now < seconds:
        for edge in writers:
            if due.get(id(edge), now + 1) <= now:
                edge.ready_at = due.pop(id(edge))
                if edge.at is None:
                    edge.at, edge.rows, edge.seconds, edge.company = 0, 1 if edge.steps else 16, 0.0, True
        group, wait = choose(writers, costs, now)
        if not group:
            now = min([*due.values(), *([] if wait is None else [now + wait])]) + 1e-9
            continue
        taken = 0.01 if group[0].at == 0 else 1 + 0.3 * (sum(edge.rows for edge in group) - 1)
        costs.passed(taken)
        for edge in group:
            edge.set_out_at = edge.set_out_at if edge.at else now
            edge.company = edge.company and len(group) > 1
            edge.seconds += taken
            edge.ready_at, due[id(edge)] = None, now + taken + edge.answer
            if edge.at < len(edge.stops):
                edge.at += 1
            else:
                edge.at, edge.left_at = None, now + taken
                edge.steps.append(edge.company)
                costs.ended(edge)
        now += taken


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(0, 200), min_size=2, max_size=4), st.sampled_from([1.0, LEAST_HOPE]))
def test_edges_that_came_at_different_times_go_together_in_the_end(moments, hope):
    """Whatever they have been waited for in vain before."""
    writers = [Writer(comes=moment, hope=hope) for moment in moments]
    let_write(writers, 4000)
    for writer in writers:
        assert all(writer.steps[-10:])


def test_one_on_a_slow_line_holds_up_no_other():
    alone, near, far = Writer(), Writer(), Writer(answer=10.0)
    let_write([alone], 4000)
    let_write([near, far], 4000)
    taken = 20 * len(far.steps)  # by the passes for the one that is far
    assert len(near.steps) > 0.96 * len(alone.steps) * (1 - taken / 4000)
    assert len(far.steps) > 0.8 * 4000 / (20 * 11)
