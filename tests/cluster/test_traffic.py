"""Bytes and times of a token's exchanges, against figures worked out by hand."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.cluster import traffic
from dllama.cluster.deal import head_unit
from dllama.cluster.planner import make_plan
from dllama.cluster.rounds import Form, meetings
from dllama.cluster.traffic import Traffic
from dllama.formats import FloatType
from tests.cluster.models import LLAMA2_7B, TINY, configs, equal_nodes

VECTOR = 4096 // 32 * 34 + traffic.MESSAGE_BYTES  # 7B's residual stream in Q80, as a message
PAIR = 8 + traffic.MESSAGE_BYTES
COST = traffic.MESSAGE_SECONDS


def rounds(plan, form):
    return traffic.rounds(form, plan.order, plan.shares, plan.buffer_type, plan.top_k)


def seconds(moved, messages, nodes):
    return traffic.seconds(traffic.Round(moved, messages), nodes)


def test_two_nodes_of_llama_2_7b_stay_below_290_kb():
    root, worker = make_plan(LLAMA2_7B, equal_nodes(2)).traffic
    assert root == Traffic(sent=VECTOR + 64 * VECTOR, received=64 * VECTOR + PAIR) == (289_120, 284_776)
    assert worker == (root.received, root.sent)
    assert max(root) <= 290_000


def test_partial_sums_in_f32():
    root, _ = make_plan(LLAMA2_7B, equal_nodes(2), buffer_type=FloatType.F32).traffic
    assert root.sent == 65 * (4096 * 4 + traffic.MESSAGE_BYTES)


def test_one_node_sends_nothing():
    plan = make_plan(LLAMA2_7B, equal_nodes(1, read_speed=4e9))
    assert plan.traffic == (Traffic(0, 0),)
    assert plan.exchange_seconds == 0
    assert plan.step_seconds() == plan.shares[0].weight_bytes / 4e9


def test_a_full_mesh():
    plan = make_plan(LLAMA2_7B, equal_nodes(4))
    assert plan.form is Form.MESH
    start, mesh, finish = rounds(plan, Form.MESH)
    ends = 3, 1, 1, 1
    assert start == ((((3 * VECTOR, 0), (0, VECTOR), (0, VECTOR), (0, VECTOR)), ends), 1)
    assert mesh == ((((3 * VECTOR, 3 * VECTOR),) * 4, (6,) * 4), 64)
    assert finish == ((((0, 3 * PAIR), (PAIR, 0), (PAIR, 0), (PAIR, 0)), ends), 1)
    message = 0.2e-3 + 3 * VECTOR / 125e6 + 3 * COST
    assert plan.exchange_seconds == pytest.approx(65 * message + 64 * 3 * COST + 0.2e-3 + 3 * PAIR / 125e6 + 3 * COST)


def test_a_butterfly_where_messages_cost_more_than_rounds():
    plan = make_plan(LLAMA2_7B, equal_nodes(8, latency=0.1e-3))
    assert plan.form is Form.BUTTERFLY
    _, *butterfly, _ = rounds(plan, Form.BUTTERFLY)
    assert butterfly == [((((VECTOR, VECTOR),) * 8, (2,) * 8), 64)] * 3
    assert plan.traffic[1] == (64 * 3 * VECTOR + PAIR, 64 * 3 * VECTOR + VECTOR)


def test_a_slow_device_is_folded_onto_a_fast_one():
    slow, *fast = equal_nodes(3, read_speed=9e9, latency=0.05e-3)
    plan = make_plan(LLAMA2_7B, [replace(slow, read_speed=3e9), *fast], [1, 3, 3])
    assert plan.form is Form.FOLD and plan.order == (1, 2, 0)
    _, there, middle, back, _ = rounds(plan, Form.FOLD)
    none, one = Traffic(0, 0), Traffic(VECTOR, VECTOR)
    assert there == (((Traffic(VECTOR, 0), Traffic(0, VECTOR), none), (1, 1, 0)), 64)
    assert middle == (((none, one, one), (0, 2, 2)), 64)
    assert back == (((Traffic(0, VECTOR), Traffic(VECTOR, 0), none), (1, 1, 0)), 64)


def clocked(plan) -> float:
    """Seconds of all layers, by a clock for each node: it reads, sends its messages one after the other, and takes in
    those of others as they come."""
    places = range(len(plan.nodes))
    met = [meetings(plan.form, plan.order, node) for node in places]
    way = [node.latency + VECTOR / node.bandwidth for node in plan.nodes]
    cost = [traffic.message_seconds(node) for node in plan.nodes]
    clock = [0.0 for _ in places]
    for segment in range(2 * plan.config.n_layers):
        for node, share in enumerate(plan.shares):
            clock[node] += plan.segment_seconds(share)[segment % 2] / plan.config.n_layers
        for round in range(len(met[0])):
            comes = {}
            for node in places:
                for other in met[node][round].to:
                    clock[node] += cost[node]
                    comes[node, other] = clock[node] + way[node]
            for node in places:
                for time in sorted(comes[other, node] for other in met[node][round].of):
                    clock[node] = max(clock[node], time) + cost[node]
    return max(clock)


UNEQUAL = [(9, 9, 3), (9, 9, 9), (9, 9), (9, 6, 4, 3, 2), (4, 4, 4, 4, 2, 2), (2, 9, 9)]


@pytest.mark.parametrize("speeds", UNEQUAL)
@pytest.mark.parametrize("planned", [True, False], ids=["the plan's shares", "in proportion to speeds"])
def test_the_time_of_a_token_is_what_clocks_would_tell(speeds, planned):
    nodes = [
        replace(node, read_speed=1e9 * speed) for node, speed in zip(equal_nodes(9, latency=5e-5), speeds, strict=False)
    ]
    plan = make_plan(LLAMA2_7B, nodes, None if planned else speeds)
    assert {plan.form} <= {Form.MESH, Form.FOLD}, "each part is a whole vector"
    outside = sum(count * traffic.seconds(round, plan.nodes) for round, count in rounds(plan, plan.form) if count == 1)
    outside += max(plan.segment_seconds(share)[2] for share in plan.shares)
    assert plan.step_seconds() - outside == pytest.approx(clocked(plan), rel=0.08)


@pytest.mark.parametrize("speeds", [(9, 9, 3), (4, 4, 4, 4, 2, 2), (9, 6, 4, 3, 2)])
def test_a_node_outside_a_fold_has_less_to_read_as_it_waits_for_its_partner(speeds):
    nodes = [
        replace(node, read_speed=1e9 * speed) for node, speed in zip(equal_nodes(9, latency=5e-5), speeds, strict=False)
    ]
    plan, in_proportion = make_plan(LLAMA2_7B, nodes), make_plan(LLAMA2_7B, nodes, speeds)
    assert plan.form is in_proportion.form is Form.FOLD
    assert clocked(plan) < 0.95 * clocked(in_proportion)


def test_reduce_scatter_and_all_gather_on_slow_links():
    plan = make_plan(LLAMA2_7B, equal_nodes(4, bandwidth=1e6))
    assert plan.form is Form.SCATTER
    quarter = 1024 // 32 * 34 + traffic.MESSAGE_BYTES
    _, scatter, gather, _ = rounds(plan, Form.SCATTER)
    assert scatter == gather == ((((3 * quarter, 3 * quarter),) * 4, (6,) * 4), 64)
    assert plan.traffic[0] == (64 * 6 * quarter + 3 * VECTOR, 64 * 6 * quarter + 3 * PAIR)
    assert plan.exchange_seconds == pytest.approx(
        128 * (0.2e-3 + 3 * quarter / 1e6 + 6 * COST)
        + (0.2e-3 + 3 * VECTOR / 1e6 + 3 * COST)
        + (0.2e-3 + 3 * PAIR / 1e6 + 3 * COST)
    )


def test_a_node_without_values_to_sum_gets_none_to_sum():
    plan = make_plan(TINY, equal_nodes(3))  # two blocks of 32 values
    block = 34 + traffic.MESSAGE_BYTES
    _, scatter, gather, _ = rounds(plan, Form.SCATTER)
    assert scatter[0] == (((block, 2 * block), (block, 2 * block), (2 * block, 0)), (3, 3, 2))
    assert gather[0] == (((2 * block, block), (2 * block, block), (0, 2 * block)), (3, 3, 2))


@pytest.mark.parametrize(
    ("values", "buffer_type", "nbytes"),
    [(60, FloatType.F32, 240), (60, FloatType.Q80, 68), (64, FloatType.Q80, 68), (0, FloatType.Q80, 0)],
)
def test_bytes_of_values_in_a_buffer(values, buffer_type, nbytes):
    assert traffic.vector_bytes(values, buffer_type) == nbytes


@pytest.mark.parametrize(("top_k", "payload"), [(1, 8), (40, 40 * 8), (128, 256 * 4), (300, 256 * 4), (0, 256 * 4)])
def test_logits_do_not_all_travel(top_k, payload):
    plan = make_plan(TINY, equal_nodes(2), top_k=top_k)
    finish, _ = rounds(plan, plan.form)[-1]
    assert finish.traffic == ((0, payload + traffic.MESSAGE_BYTES), (payload + traffic.MESSAGE_BYTES, 0))


def test_a_round_takes_as_long_as_its_slowest_node():
    fast, far, narrow = equal_nodes(3)
    far, narrow = replace(far, latency=0.01), replace(narrow, bandwidth=1000.0)
    pair = Traffic(10, 20), Traffic(20, 10)
    assert seconds((*pair,), (1, 1), (fast, far)) == pytest.approx(0.01 + 20 / 125e6 + COST)
    assert seconds((*pair,), (1, 1), (fast, narrow)) == pytest.approx(0.2e-3 + 0.02 + COST)
    assert seconds((*pair,), (1, 4), (fast, fast)) == pytest.approx(0.2e-3 + 20 / 125e6 + 4 * COST)
    assert seconds((*pair, Traffic(0, 0)), (1, 1, 0), (fast, fast, far)) < 0.001


def test_a_message_costs_a_slow_device_more():
    fast, slow, slowest, unknown = (
        replace(node, read_speed=speed) for node, speed in zip(equal_nodes(4), (28e9, 14e9, 1e6, None), strict=True)
    )
    assert [traffic.message_seconds(node) / COST for node in (fast, slow, slowest, unknown)] == [1, 2, 10, 1]


def test_slow_devices_meet_in_a_butterfly_and_fast_ones_in_a_mesh():
    fast = equal_nodes(8, read_speed=40e9, latency=0.5e-3)
    slow = equal_nodes(8, read_speed=4e9, latency=0.5e-3)
    assert [make_plan(LLAMA2_7B, nodes, [1] * 8).form for nodes in (fast, slow)] == [Form.MESH, Form.BUTTERFLY]


@given(configs(), st.data())
def test_what_is_sent_is_received_in_the_faster_form(config, data):
    count = data.draw(st.integers(1, min(config.n_heads // head_unit(config), 9)))
    nodes = [
        replace(node, bandwidth=data.draw(st.floats(1e5, 1e9)), latency=data.draw(st.floats(0, 0.01)))
        for node in equal_nodes(count)
    ]
    plan = make_plan(
        config,
        nodes,
        ratios=[1.0] * count,
        buffer_type=data.draw(st.sampled_from([FloatType.Q80, FloatType.F32])),
        top_k=data.draw(st.integers(0, 50)),
    )
    times = {}
    for form in Form:
        found = rounds(plan, form)
        for (moved, messages), _ in found:
            assert sum(node.sent for node in moved) == sum(node.received for node in moved)
            assert sum(messages) % 2 == 0
        times[form] = sum(times * traffic.seconds(round, nodes) for round, times in found)
    assert plan.exchange_seconds == times[plan.form] == min(times.values())
    found = rounds(plan, plan.form)
    assert [node.sent for node in plan.traffic] == [
        sum(times * round.traffic[node].sent for round, times in found) for node in range(count)
    ]
