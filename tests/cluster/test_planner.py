"""Who takes part and with how much: speeds, ratios, memory, and what cannot be planned."""

import contextlib
import math
from dataclasses import replace
from itertools import combinations

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from dllama.cluster.deal import head_unit
from dllama.cluster.node import NodeSpec
from dllama.cluster.planner import make_plan
from dllama.engine.memory import RUNTIME_BYTES
from dllama.errors import PlanError
from dllama.formats import FloatType
from tests.cluster.models import LLAMA2_7B, LLAMA3_8B, SMALL, TINY, configs, equal_nodes

FAST_LINK = {"bandwidth": 1e12, "latency": 0.0}


def names(plan) -> list[str]:
    return [node.name for node in plan.nodes]


def heads(plan) -> list[int]:
    return [len(share.heads) for share in plan.shares]


def reasons(plan) -> dict[str, str]:
    return {node.name: reason for node, reason in plan.left_out}


@st.composite
def cases(draw):
    """Any model with nodes of any speed, memory and link."""
    config = draw(configs())
    count = draw(st.integers(1, min(config.n_heads // head_unit(config), 4)))
    nodes = [
        NodeSpec(
            f"node{i}",
            read_speed=draw(st.sampled_from([1e6, 1e7, 3e7, 1e8])),
            memory=draw(st.none() | st.integers(RUNTIME_BYTES, RUNTIME_BYTES + 3_000_000)),
            bandwidth=draw(st.sampled_from([1e6, 1e9])),
            latency=draw(st.sampled_from([0, 1e-5, 1e-3])),
        )
        for i in range(count)
    ]
    return config, nodes


@given(cases())
def test_a_plan_fits_is_fastest_and_is_always_the_same(case):
    config, nodes = case
    try:
        plan = make_plan(config, nodes)
    except PlanError as error:
        assert "not enough memory" in str(error)
        return
    assert plan == make_plan(config, list(nodes))
    assert plan.nodes[0] is nodes[0]
    assert sorted(names(plan) + list(reasons(plan))) == [node.name for node in nodes]
    assert all(share.heads for share in plan.shares)
    for share in plan.shares:
        assert share.node.memory is None or share.memory_bytes(plan.context, plan.kv_type) <= share.node.memory
    for count in range(len(nodes)):
        for workers in combinations(nodes[1:], count):
            try:
                other = make_plan(config, [nodes[0], *workers])
            except PlanError:
                continue
            assert plan.step_seconds() <= other.step_seconds() * 1.25  # a search, but not far from the best


@given(configs(), st.data())
def test_ratios_are_kept_within_rounding(config, data):
    unit = head_unit(config)
    count = data.draw(st.integers(1, min(config.n_heads // unit, 6)))
    ratios = data.draw(st.lists(st.integers(1, 5), min_size=count, max_size=count))
    assume(min(ratios) * config.n_heads >= unit * sum(ratios))  # nobody is left without a head
    plan = make_plan(config, equal_nodes(count, read_speed=1e9), ratios)
    assert not plan.left_out
    for share, ratio in zip(plan.shares, ratios, strict=True):
        part = ratio / sum(ratios)
        for units, total in ((share.ffn_blocks, -(-config.ffn_dim // 32)), (share.vocab, config.vocab_size)):
            assert part * total - 1 < len(units) <= part * (total + count) + 1e-9


def test_shares_follow_ratios():
    nodes = [NodeSpec("a", read_speed=8e9), NodeSpec("b", read_speed=4e9), NodeSpec("c", read_speed=4e9)]
    plan = make_plan(LLAMA2_7B, nodes, [2, 1, 1])
    assert heads(plan) == [16, 8, 8]
    assert [len(share.ffn_blocks) for share in plan.shares] == [172, 86, 86]
    assert [len(share.vocab) for share in plan.shares] == [16000, 8000, 8000]
    assert heads(make_plan(LLAMA2_7B, nodes, [1, 2, 1])) == [8, 16, 8]


def test_slow_nodes_get_less_than_their_speed_as_messages_cost_them_more():
    nodes = [NodeSpec("a", read_speed=9e9), NodeSpec("b", read_speed=9e9), NodeSpec("c", read_speed=6e9)]
    plan, by_speed = make_plan(LLAMA2_7B, nodes), make_plan(LLAMA2_7B, nodes, [3, 3, 2])
    assert heads(plan)[2] < heads(by_speed)[2]
    assert plan.step_seconds() < by_speed.step_seconds()
    done = [sum(plan.segment_seconds(share)[:2]) + plan.held_seconds(i) for i, share in enumerate(plan.shares)]
    assert max(done) < 1.1 * min(done)  # all at the same time, as far as whole heads go
    assert plan.exchange_seconds < by_speed.exchange_seconds


def test_equal_nodes_get_equal_shares():
    plan = make_plan(LLAMA2_7B, equal_nodes(4, read_speed=4e9))
    assert heads(plan) == [8] * 4


def test_threads_stand_in_for_speeds_that_nobody_knows():
    plan = make_plan(LLAMA2_7B, [NodeSpec("a", threads=4), NodeSpec("b", threads=2), NodeSpec("c", threads=2)])
    assert heads(plan) == [16, 8, 8]
    assert plan.read_seconds() is None
    assert plan.step_seconds() is None
    assert plan.exchange_seconds > 0


def test_the_time_of_a_token():
    plan = make_plan(LLAMA2_7B, [NodeSpec("a", read_speed=8e9), NodeSpec("b", read_speed=1e9)], [29, 3])
    assert heads(plan) == [29, 3]
    a, b = (share.segment_bytes for share in plan.shares)
    # 29 / 8 is the longest for attention, and so is a's part of the rest.
    slowest = [max(a[part] / 8e9, b[part] / 1e9) for part in ("attention", "ffn", "output")]
    assert plan.read_seconds() == pytest.approx(sum(slowest))
    cache = 100 * plan.shares[0].kv_bytes_per_position(FloatType.F16)
    assert plan.read_seconds(100) - plan.read_seconds() == pytest.approx(cache / 8e9)
    assert plan.step_seconds(100) == plan.read_seconds(100) + plan.exchange_seconds


def test_every_node_takes_part_where_exchanges_are_cheap():
    for count in (1, 2, 3, 4, 6, 8, 32):
        plan = make_plan(LLAMA2_7B, equal_nodes(count, read_speed=2e8))
        assert len(plan.shares) == count
        assert not plan.left_out


def test_more_nodes_are_faster_up_to_eight_weak_devices():
    times = [make_plan(LLAMA2_7B, equal_nodes(count, read_speed=4e9)).step_seconds() for count in (1, 2, 3, 4, 8)]
    assert times == sorted(times, reverse=True)


def test_workers_whose_exchanges_cost_more_than_they_help_are_left_out():
    plan = make_plan(TINY, equal_nodes(3, read_speed=4e9))
    assert names(plan) == ["node0"]
    with_it = 1e3 * make_plan(TINY, equal_nodes(2, read_speed=4e9), [1, 1]).step_seconds()
    reason = f"it is too slow to help: a token takes {with_it:.1f} ms with it, 0.0 ms without"
    assert with_it > 1 and reasons(plan) == {"node1": reason, "node2": reason}
    assert names(make_plan(TINY, equal_nodes(3, read_speed=4e9), [1, 1, 1])) == ["node0", "node1", "node2"]
    assert len(make_plan(TINY, equal_nodes(3, read_speed=1e6, **FAST_LINK)).shares) == 3


def test_the_root_alone_is_found_where_fewer_workers_are_worse_than_many():
    (whole,) = make_plan(SMALL, equal_nodes(1)).shares
    exchanges = (2 * SMALL.n_layers + 2) * 50e-3
    nodes = equal_nodes(8, read_speed=whole.weight_bytes / (1.05 * exchanges), bandwidth=1e12, latency=50e-3)
    times = [make_plan(SMALL, nodes[:count], [1] * count).step_seconds() for count in range(1, 9)]
    assert times[0] < times[7] < times[6]
    assert names(make_plan(SMALL, nodes)) == ["node0"]


def test_a_worker_on_a_bad_link_is_left_out_and_those_on_good_ones_are_not():
    a, b, c, d = equal_nodes(4, read_speed=4e9)
    plan = make_plan(LLAMA2_7B, [a, replace(b, read_speed=40e9, latency=0.05), c, d])
    assert names(plan) == ["node0", "node2", "node3"]
    assert reasons(plan)["node1"].startswith("it is too slow to help: a token takes ")


# GB/s, GB of memory, Mbit/s and ms of latency for each node. The faster half is on links that are bad in some way.
MIXED = [
    (LLAMA2_7B, [(20, 99, 100, 0.05), (4, 4, 1000, 0.05), (9, 4, 100, 2), (20, 99, 8000, 2), (4, 4, 1000, 0.05),
                 (20, 1, 100, 0.05), (1, 1, 1000, 0.2)]),
    (LLAMA3_8B, [(20, 99, 100, 0.05), (4, 4, 1000, 0.05), (9, 4, 100, 2), (20, 99, 8000, 2), (4, 4, 1000, 0.05),
                 (20, 1, 100, 0.05), (1, 1, 1000, 0.2)]),
    (SMALL, [(0.1, 1, 8000, 0.05), (1, 4, 100, 0.05), (20, 99, 8000, 2), (20, 4, 8000, 0.05), (9, 1, 100, 0.05),
             (0.1, 99, 100, 2), (9, 4, 100, 2)]),
]  # fmt: skip


@pytest.mark.parametrize(("config", "devices"), MIXED)
def test_the_search_finds_the_best_of_all_choices(config, devices):
    nodes = [
        NodeSpec(f"node{i}", speed * 1e9, int(memory * 1e9), bandwidth=mbit * 125e3, latency=ms / 1000)
        for i, (speed, memory, mbit, ms) in enumerate(devices)
    ]
    best = math.inf
    for count in range(len(nodes)):
        for workers in combinations(nodes[1:], count):
            with contextlib.suppress(PlanError):  # too little memory
                best = min(best, make_plan(config, [nodes[0], *workers]).step_seconds())
    assert make_plan(config, nodes).step_seconds() == best


def test_a_worker_too_slow_for_a_head_is_left_out():
    a, b, c = equal_nodes(3, read_speed=4e9)
    plan = make_plan(LLAMA2_7B, [a, replace(b, read_speed=1e6), c])
    assert reasons(plan) == {"node1": "its share comes to less than a head"}
    assert heads(plan) == [16, 16]
    assert reasons(make_plan(LLAMA2_7B, [a, b, c], [100, 1, 100])) == {"node1": "its share comes to less than a head"}
    small = replace(TINY, head_dim=16)
    assert reasons(make_plan(small, [a, b], [100, 1])) == {"node1": "its share comes to less than 2 heads"}


def test_a_slow_root_keeps_one_head():
    plan = make_plan(LLAMA2_7B, [NodeSpec("root", read_speed=1e7), *equal_nodes(2, read_speed=9e9)])
    assert heads(plan)[0] == 1


def test_a_slow_worker_is_kept_where_its_memory_is_needed():
    a, b = NodeSpec("a", read_speed=9e9, memory=3 << 30), NodeSpec("b", read_speed=1e8, memory=8 << 30)
    plan = make_plan(LLAMA2_7B, [a, b])
    assert names(plan) == ["a", "b"]
    needed = plan.shares[0].memory_bytes(plan.context, plan.kv_type)
    assert 0.9 * a.memory < needed <= a.memory


def test_what_does_not_fit_one_node_goes_to_the_others():
    full = make_plan(LLAMA2_7B, equal_nodes(3, read_speed=4e9))
    needed = full.shares[0].memory_bytes(full.context, full.kv_type)
    a, b, c = equal_nodes(3, read_speed=4e9)
    plan = make_plan(LLAMA2_7B, [replace(a, memory=needed // 2), b, c])
    assert heads(plan) == [4, 14, 14]


def test_a_worker_whose_memory_holds_nothing_is_left_out():
    a, b, c = equal_nodes(3, read_speed=4e9)
    plan = make_plan(LLAMA2_7B, [a, replace(b, memory=RUNTIME_BYTES), c])
    assert reasons(plan) == {"node1": "its 150.0 MB of memory hold no share of the model"}


def test_memory_that_does_not_suffice():
    nodes = equal_nodes(2, read_speed=4e9, memory=2_500_000_000)
    with pytest.raises(PlanError) as error:
        make_plan(LLAMA2_7B, nodes)
    needs = [share.memory_bytes(4096, FloatType.F16) for share in make_plan(LLAMA2_7B, equal_nodes(2)).shares]
    assert str(error.value).startswith(
        f"not enough memory for a context of 4096 tokens: node node0 needs 3.15 GB ({needs[0]} bytes) and has 2.50 GB "
        f"(2500000000 bytes), 650.2 MB are missing (all nodes together: {(sum(needs) - 5e9) / 1e9:.2f} GB); a shorter "
    )
    assert len(make_plan(LLAMA2_7B, nodes, context=256).shares) == 2


def test_ratios_are_not_changed_for_memory():
    nodes = [NodeSpec("a", memory=2_000_000_000), NodeSpec("b")]
    with pytest.raises(PlanError, match="node a needs 3.15 GB"):
        make_plan(LLAMA2_7B, nodes, [1, 1])
    assert heads(make_plan(LLAMA2_7B, nodes, [1, 3])) == [8, 24]


@settings(max_examples=20)
@given(st.lists(st.sampled_from([1e9, 4e9, 9e9]), min_size=3, max_size=6))
def test_memory_is_found_where_there_is_a_twentieth_to_spare(speeds):
    nodes = [NodeSpec(f"node{i}", read_speed=speed, **FAST_LINK) for i, speed in enumerate(speeds)]
    ample = make_plan(LLAMA2_7B, nodes)
    assume(len(ample.shares) == len(nodes))
    needed = sum(share.memory_bytes(4096, FloatType.F16) for share in ample.shares)
    each = int(1.05 * needed / len(nodes))
    plan = make_plan(LLAMA2_7B, [replace(node, memory=each) for node in nodes])
    assert all(share.memory_bytes(4096, FloatType.F16) <= each for share in plan.shares)


A, B = equal_nodes(2, read_speed=1e9)


@pytest.mark.parametrize(
    ("nodes", "options", "message"),
    [
        ([], {}, "no nodes to plan for"),
        ([A, B, A], {}, "node node0 is given twice"),
        ([A, B], {"ratios": [1]}, "1 ratios for the nodes node0, node1: each needs one, the root's first"),
        ([A], {"ratios": [2, 1]}, "2 ratios for the nodes node0: each needs one, the root's first"),
        ([A, B], {"ratios": []}, "0 ratios for the nodes node0, node1: each needs one, the root's first"),
        ([A, B], {"ratios": [1, 0]}, "node node1: its ratio is 0, and has to be a number above 0"),
        ([A, B], {"ratios": [1, float("nan")]}, "node node1: its ratio is nan, and has to be a number above 0"),
        ([A, NodeSpec("b")], {}, "the read speed of node b is not known, and that of others is: give all or none"),
        ([A], {"context": 257}, "a context of 257 tokens, and the model's is 256"),
        ([A], {"context": 0}, "a context of 0 tokens, and the model's is 256"),
        (equal_nodes(5, read_speed=1e9), {}, "5 nodes, and each needs a head of its own: the model has 4"),
    ],
)
def test_what_cannot_be_planned(nodes, options, message):
    with pytest.raises(PlanError) as error:
        make_plan(TINY, nodes, **options)
    assert str(error.value) == message
