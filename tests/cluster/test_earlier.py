"""What was measured at earlier starts: gone by while it holds, given up when it does not."""

import json
import math
import time
from dataclasses import replace
from itertools import cycle

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.cluster.earlier import DAY, MOST_NODES, Earlier
from dllama.cluster.node import NodeSpec
from dllama.cluster.planner import make_plan
from tests.cluster.models import LLAMA2_7B

ROOT = NodeSpec("root", None, 4 << 30, 2)
NODE = NodeSpec("10.0.0.2:9998", 5e9, 2 << 30, 4, 110e6, 0.3e-3)
OTHER = replace(NODE, name="10.0.0.3:9998")
TOGETHER = (8e9, 4e9, 4e9)


@pytest.fixture
def said():
    return []


class Starts:
    """Starts of a root. ``measured``: how often nodes were."""

    def __init__(self, path, notify):
        self._path, self._notify = path, notify
        self.measured = 0

    def __call__(self, *nodes, speeds=TOGETHER):
        """The nodes as they are gone by at a start, at which they would be measured together as ``speeds``."""

        def measure():
            self.measured += 1
            return speeds[: len(nodes)]

        return Earlier(self._notify, self._path).settled(nodes, measure)


@pytest.fixture
def start(tmp_path, said):
    return Starts(tmp_path / "cache" / "nodes.json", said.append)


@pytest.fixture
def days_later(monkeypatch):
    """``days_later(days)``: it is so much later than now."""
    now = time.time()
    return lambda days: monkeypatch.setattr(time, "time", lambda: now + days * DAY)


def as_measured(nodes, speeds=TOGETHER):
    return [replace(node, read_speed=speed) for node, speed in zip(nodes, speeds, strict=False)]


def test_nodes_are_measured_once(start, said):
    nodes = ROOT, NODE, OTHER
    assert start(*nodes) == as_measured(nodes)
    for node in (NODE, replace(NODE, read_speed=8e9), replace(NODE, read_speed=2.6e9), NODE):
        assert start(ROOT, node, OTHER, speeds=(1e9, 1e9, 1e9)) == as_measured(nodes)
    assert start.measured == 1 and said == []


def test_other_figures_hold_as_well_while_they_are_about_the_same(start):
    expected = start(ROOT, NODE)
    now = replace(NODE, memory=NODE.memory + (1 << 20), bandwidth=70e6, latency=0.2e-3)
    assert start(ROOT, now) == expected


def test_some_of_the_nodes_that_were_measured_need_no_other_measurement(start):
    root, node, other = start(ROOT, NODE, OTHER)
    assert start(ROOT, OTHER) == [root, other] and start(ROOT, NODE) == [root, node] and start(ROOT) == [root]
    assert start.measured == 1


def test_nodes_that_were_not_measured_together_are_measured_again(start):
    start(ROOT, NODE)
    start(ROOT, OTHER, speeds=(9e9, 3e9))
    assert start.measured == 2
    assert start(ROOT, NODE, OTHER, speeds=(9e9, 5e9, 6e9)) == as_measured((ROOT, NODE, OTHER), (9e9, 5e9, 6e9))
    assert start(ROOT, NODE, OTHER) == as_measured((ROOT, NODE, OTHER), (9e9, 5e9, 6e9))
    assert start.measured == 3


def test_nodes_are_measured_again_after_a_day(start, said, days_later):
    expected = start(ROOT, NODE)
    for days, times in ((0.9, 1), (1.1, 2), (1.2, 2), (2.2, 3), (-1, 4)):
        days_later(days)
        assert start(ROOT, NODE, speeds=(4.1e9, 2e9)) == expected, "all is slower, and beside each other the same"
        assert start.measured == times
    assert said == []


def test_nodes_that_are_otherwise_beside_each_other_are_taken_as_they_are(start, said, days_later):
    start(ROOT, NODE)
    days_later(1.5)
    assert start(ROOT, NODE, speeds=(8e9, 3e9)) == as_measured((ROOT, NODE), (8e9, 3e9))
    assert said == [
        "shares are dealt anew, as nodes work through other amounts of weights a second: "
        "root 8.00 GB (taken for 8.00 GB), 10.0.0.2:9998 3.00 GB (taken for 4.00 GB)"
    ]


@pytest.mark.parametrize("alone", [5e9 / 2.1, 5e9 * 2.1])
def test_a_worker_that_tells_of_another_speed_has_all_measured_again(start, said, alone):
    start(ROOT, NODE)
    now = replace(NODE, read_speed=alone)
    assert start(ROOT, now, speeds=(8e9, 2e9)) == as_measured((ROOT, now), (8e9, 2e9))
    assert start(ROOT, now) == as_measured((ROOT, now), (8e9, 2e9))
    assert start.measured == 2 and len(said) == 1


def test_a_speed_that_creeps_away_is_noticed(start):
    start(ROOT, NODE)
    for factor in (1.4, 1.9, 2.1):
        start(ROOT, replace(NODE, read_speed=factor * NODE.read_speed))
    assert start.measured == 2


@given(
    st.lists(st.lists(st.floats(0.98, 1.02), min_size=4, max_size=4), min_size=2, max_size=8),
    st.lists(st.sampled_from([1e9, 4e9, 9e9]), min_size=4, max_size=4),
)
def test_shares_do_not_follow_the_noise_of_measurements(tmp_path_factory, starts, strengths):
    path, said, shares = tmp_path_factory.mktemp("starts") / "nodes.json", [], set()
    for alone, noise in zip(cycle((1e9, 3e9)), starts, strict=False):  # so that they are measured at each start
        nodes = [NodeSpec("node0"), *(NodeSpec(f"node{i}", alone) for i in (1, 2, 3))]
        now = [s * f for s, f in zip(strengths, noise, strict=True)]
        plan = make_plan(LLAMA2_7B, Earlier(said.append, path).settled(nodes, lambda now=now: now), context=512)
        shares.add(tuple((share.heads, share.ffn_blocks, share.vocab) for share in plan.shares))
    assert len(shares) == 1 and said == []


def test_a_node_is_not_taken_to_have_more_memory_than_it_has(start):
    def memory(now):
        return start(replace(NODE, memory=now))[0].memory

    start(NODE)
    less, little_more, more = NODE.memory - 1, NODE.memory + 1, 2 * NODE.memory
    assert (memory(little_more), memory(less), memory(NODE.memory)) == (NODE.memory, less, less)
    assert (memory(more), memory(None)) == (more, None)


def test_another_link_counts_at_once(start, said):
    start(NODE)
    slow = replace(NODE, bandwidth=12e6, latency=2e-3)
    assert start(slow) == as_measured([slow]) and said == [] and start.measured == 1


def test_the_same_address_with_other_threads_is_another_node(start, said):
    (first,) = start(NODE)
    one = replace(NODE, threads=1)
    assert start(one, speeds=(1e9,)) == as_measured([one], (1e9,))
    assert start(NODE) == [first] and said == [] and start.measured == 2


def test_the_nodes_used_last_are_kept(start):
    for i in range(MOST_NODES + 1):
        start(replace(NODE, name=f"node{i}"))
    before = start.measured
    start(replace(NODE, name="node1"))
    assert start.measured == before
    start(replace(NODE, name="node0"))
    assert start.measured == before + 1


def figures(**wrong):
    good = {"read_speed": 3.9e9, "alone": 5e9, "when": time.time(), "memory": 1, "bandwidth": 1e8, "latency": 0}
    return json.dumps({"10.0.0.2:9998 4": good | wrong})


@pytest.mark.parametrize(
    "text",
    ["", "[]", "{", "\udcff", '{"10.0.0.2:9998 4": 1}', '{"10.0.0.2:9998 4": {"read_speed": 4e9}}']
    + [
        figures(**wrong)
        for wrong in (
            {"read_speed": math.nan},
            {"read_speed": -1},
            {"read_speed": None},
            {"read_speed": "fast"},
            {"alone": 0},
            {"alone": "5e9"},
            {"when": None},
            {"memory": 1e9},
            {"more": 1},
        )
    ],
)
def test_a_file_that_says_something_else_is_written_anew(start, tmp_path, text):
    path = tmp_path / "cache" / "nodes.json"
    path.parent.mkdir()
    path.write_bytes(text.encode(errors="surrogateescape"))
    assert start(NODE) == as_measured([NODE])
    assert json.loads(path.read_text())["10.0.0.2:9998 4"]["alone"] == NODE.read_speed


def test_what_the_file_says_is_gone_by(start, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "nodes.json").write_text(figures())
    assert start(NODE) == [replace(NODE, read_speed=3.9e9, bandwidth=1e8)] and start.measured == 0


def test_a_worker_that_was_a_root_is_measured_again(start, tmp_path):
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / "nodes.json").write_text(figures(alone=None))
    start(NODE)
    assert start.measured == 1


def test_a_folder_that_cannot_be_written(tmp_path, said):
    (tmp_path / "cache").write_text("a file")
    start = Starts(tmp_path / "cache" / "nodes.json", said.append)
    for times in (1, 2):
        assert start(NODE) == as_measured([NODE]) and start.measured == times
    assert said == []
