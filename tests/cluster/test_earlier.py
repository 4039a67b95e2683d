"""What was measured at earlier starts: gone by while it holds, given up when it does not."""

import json
import math
import time
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.cluster.earlier import DAY, MEASUREMENTS, MOST_NODES, Earlier
from dllama.cluster.node import NodeSpec
from dllama.cluster.planner import make_plan
from tests.cluster.models import LLAMA2_7B

NODE = NodeSpec("10.0.0.2:9998", 4e9, 2 << 30, 4, 110e6, 0.3e-3)


@pytest.fixture
def said():
    return []


@pytest.fixture
def start(tmp_path, said):
    """A start of the root, with nodes as they were measured."""
    return lambda *nodes: Earlier(said.append, tmp_path / "cache" / "nodes.json").settled(nodes)


def speeds(start, *measured):
    return [start(replace(NODE, read_speed=speed))[0].read_speed for speed in measured]


def test_the_first_figures_hold(start, said):
    assert start(NODE) == [NODE]
    assert start(replace(NODE, read_speed=4.3e9, memory=NODE.memory + (1 << 20), bandwidth=70e6, latency=0.2e-3)) == [
        NODE
    ]
    assert said == []


@given(
    st.lists(st.lists(st.floats(0.96, 1.04), min_size=4, max_size=4), min_size=2, max_size=8),
    st.lists(st.sampled_from([1e9, 4e9, 9e9]), min_size=4, max_size=4),
)
def test_shares_do_not_follow_the_noise_of_measurements(tmp_path_factory, starts, strengths):
    path, said, shares = tmp_path_factory.mktemp("starts") / "nodes.json", [], set()
    for noise in starts:
        nodes = [NodeSpec(f"node{i}", s * f) for i, (s, f) in enumerate(zip(strengths, noise, strict=True))]
        plan = make_plan(LLAMA2_7B, Earlier(said.append, path).settled(nodes), context=512)
        shares.add(tuple((share.heads, share.ffn_blocks, share.vocab) for share in plan.shares))
    assert len(shares) == 1 and said == []


def test_a_node_that_has_become_another_is_taken_as_it_is(start, said):
    assert speeds(start, 4e9, 1.5e9, 1.6e9) == [4e9, 1.5e9, 1.5e9]
    assert said == [
        "10.0.0.2:9998 works through 1.50 GB of weights a second, not 4.00 GB as it was taken for: "
        "shares are dealt anew"
    ]


def test_a_bad_first_measurement_does_not_last(start, said):
    measured = [3e9, *(4e9 + i for i in range(MEASUREMENTS))]
    assert speeds(start, *measured) == [3e9] * (MEASUREMENTS - 1) + [measured[MEASUREMENTS // 2]] * 2
    assert len(said) == 1


def test_single_bad_measurements_change_nothing(start, said):
    measured = [4e9, 2.1e9, 4.1e9, 3.9e9, 7e9, *(3.9e9 + i for i in range(MEASUREMENTS))]
    assert speeds(start, *measured) == [4e9] * len(measured)
    assert said == []


def test_a_measurement_counts_once_however_often_a_root_plans(start):
    assert speeds(start, 3e9, *[4e9] * 9) == [3e9] * 10


def test_a_root_measures_itself_once_a_day(start, tmp_path, said, monkeypatch):
    earlier = Earlier(said.append, tmp_path / "cache" / "nodes.json")
    assert earlier.speed(NODE) is None
    speeds(start, 3e9, 4e9)
    assert earlier.speed(NODE) == 4e9 and earlier.speed(replace(NODE, threads=1)) is None
    start(replace(NODE, read_speed=earlier.speed(NODE)))
    now = time.time()
    for days, expected in ((0.9, 4e9), (1.1, None), (-1, None)):
        monkeypatch.setattr(time, "time", lambda days=days: now + days * DAY)
        assert earlier.speed(NODE) == expected


def test_a_node_is_not_taken_to_have_more_memory_than_it_has(start):
    start(NODE)
    less, more = (replace(NODE, memory=memory) for memory in (NODE.memory - 1, 2 * NODE.memory))
    assert start(less) == [less] and start(NODE) == [less]
    assert start(more) == [more] and start(replace(NODE, memory=None)) == [replace(NODE, memory=None)]


def test_another_link_counts_at_once(start, said):
    start(NODE)
    slow = replace(NODE, bandwidth=12e6, latency=2e-3)
    assert start(slow) == [slow] and said == []


def test_the_same_address_with_other_threads_is_another_node(start, said):
    start(NODE)
    assert start(one := replace(NODE, threads=1, read_speed=1e9)) == [one]
    assert start(NODE) == [NODE] and said == []


def test_the_nodes_used_last_are_kept(start, tmp_path):
    for i in range(MOST_NODES + 1):
        start(replace(NODE, name=f"node{i}"))
    assert start(replace(NODE, name="node1", read_speed=4.1e9))[0].read_speed == 4e9
    assert start(replace(NODE, name="node0", read_speed=4.1e9))[0].read_speed == 4.1e9


FIGURES = {"read_speed": 3.9e9, "measured": [3.9e9], "when": 0.0, "memory": 1, "bandwidth": 1e8, "latency": 0}
NO_FIGURES = [
    {"read_speed": math.nan},
    {"read_speed": -1},
    {"read_speed": "fast"},
    {"measured": [0]},
    {"measured": 1},
    {"measured": []},
    {"when": None},
    {"memory": 1e9},
    {"more": 1},
]


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "\udcff", '{"10.0.0.2:9998 4": 1}', '{"10.0.0.2:9998 4": {"read_speed": 4e9}}']
    + [json.dumps({"10.0.0.2:9998 4": FIGURES | wrong}) for wrong in NO_FIGURES],
)
def test_a_file_that_says_something_else_is_written_anew(start, tmp_path, text):
    path = tmp_path / "cache" / "nodes.json"
    path.parent.mkdir()
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert start(NODE) == [NODE]
    assert json.loads(path.read_text())["10.0.0.2:9998 4"]["measured"] == [NODE.read_speed]


def test_what_the_file_says_is_gone_by(start, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "nodes.json").write_text(json.dumps({"10.0.0.2:9998 4": FIGURES}))
    assert start(NODE) == [replace(NODE, read_speed=3.9e9, bandwidth=1e8)]


def test_a_folder_that_cannot_be_written(tmp_path, said):
    (tmp_path / "cache").write_text("a file")
    for speed in (4e9, 4.1e9):
        node = replace(NODE, read_speed=speed)
        assert Earlier(said.append, tmp_path / "cache" / "nodes.json").settled([node]) == [node]
    assert said == []
