"""Rounds of an exchange: everyone ends up with the same sum, in as few messages as there should be."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.cluster.rounds import Form, factors, meetings

FORMS = [form for form in Form if form is not Form.SCATTER]


def summed(form, order, parts, travel):
    """What each node has in the end, where ``travel(part)`` is what a part is after a journey."""
    each = [meetings(form, order, node) for node in range(len(order))]
    for round in zip(*each, strict=True):
        sent = [travel(part) for part in parts]
        for node, meeting in enumerate(round):
            assert all(node in round[other].of for other in meeting.to)
            assert all(node in round[other].to for other in meeting.of)
            assert {*meeting.of} | {node} >= {*meeting.summed} >= {*meeting.of}
            if meeting.summed:
                parts[node] = sum((sent[other] for other in meeting.summed), np.float32(0))
    return parts


@given(st.sampled_from(FORMS), st.permutations(range(9)).map(tuple) | st.permutations(range(7)).map(tuple), st.data())
def test_all_nodes_have_the_same_bits(form, order, data):
    order = tuple(node for node in order if node < data.draw(st.shared(st.integers(2, len(order)), key=order)))
    nodes = len(order)
    parts = [np.float32(data.draw(st.floats(-1, 1))) for _ in range(nodes)]
    exact = sum(map(float, parts))
    found = summed(form, order, parts, lambda part: np.float32(np.float16(part)))
    assert len(set(found)) == 1 and abs(found[0] - exact) < 0.02 * nodes


@pytest.mark.parametrize(("n", "expected"), [(1, []), (2, [2]), (5, [5]), (6, [2, 3]), (8, [2, 2, 2]), (12, [2, 2, 3])])
def test_prime_factors(n, expected):
    assert factors(n) == expected


@pytest.mark.parametrize(
    ("form", "nodes", "messages"),
    [
        (Form.MESH, 5, [4] * 5),
        (Form.BUTTERFLY, 5, [4] * 5),
        (Form.BUTTERFLY, 8, [3] * 8),
        (Form.BUTTERFLY, 12, [4] * 12),
        (Form.FOLD, 3, [2, 1, 1]),
        (Form.FOLD, 4, [2, 2, 1, 1]),
        (Form.FOLD, 5, [3, 2, 2, 2, 1]),
        (Form.FOLD, 7, [3, 3, 3, 2, 1, 1, 1]),
        (Form.FOLD, 8, [3, 3, 3, 3, 1, 1, 1, 1]),
    ],
)
def test_messages_that_each_sends(form, nodes, messages):
    each = [meetings(form, range(nodes), node) for node in range(nodes)]
    assert [sum(len(meeting.to) for meeting in met) for met in each] == messages
    assert [sum(len(meeting.of) for meeting in met) for met in each] == messages


def test_those_that_messages_cost_most_have_least_to_do_with_them():
    assert [len(meeting.to) for meeting in meetings(Form.FOLD, (2, 0, 1), 1)] == [1, 0, 0]
    assert meetings(Form.FOLD, (2, 0, 1), 2)[0].of == (1,)
