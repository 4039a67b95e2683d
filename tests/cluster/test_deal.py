"""Dealing out whole units, and heads together with the kv heads that they read."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.cluster.deal import deal, deal_heads, head_unit, kv_heads_of, spans
from dllama.errors import PlanError
from dllama.formats import FloatType
from tests.cluster.models import LLAMA2_7B, LLAMA3_8B, TINY, configs

WEIGHTS = st.lists(st.floats(0.01, 100) | st.floats(1e8, 1e10), min_size=1, max_size=12)


@pytest.mark.parametrize(
    ("units", "weights", "counts"),
    [
        (32, [1, 1, 1], [11, 11, 10]),
        (10, [1, 1, 1, 1], [3, 3, 2, 2]),
        (344, [2, 1, 1], [172, 86, 86]),
        (3, [1, 1, 1, 1], [1, 1, 1, 0]),
        (12, [10, 0.5, 0.5], [12, 0, 0]),  # a slow node would take longer over one than the fast one over all
        (7, [1e10, 1e9], [7, 0]),
        (0, [1, 2], [0, 0]),
    ],
)
def test_whole_units(units, weights, counts):
    assert deal(units, weights) == counts


@given(st.integers(0, 5000), WEIGHTS)
def test_the_slowest_is_as_fast_as_it_can_be(units, weights):
    counts = deal(units, weights)
    assert sum(counts) == units
    slowest = max(count / weight for count, weight in zip(counts, weights, strict=True))
    # Any other way to deal gives somebody one unit more than it has here.
    assert all((count + 1) / weight >= slowest * (1 - 1e-12) for count, weight in zip(counts, weights, strict=True))


@given(st.integers(0, 5000), WEIGHTS)
def test_counts_are_exact_shares_within_rounding(units, weights):
    for count, weight in zip(deal(units, weights), weights, strict=True):
        share = weight / sum(weights)
        assert count > units * share - 1 - 1e-9
        assert count <= (units + len(weights)) * share * (1 + 1e-9)


@given(st.integers(1, 100), WEIGHTS)
def test_the_first_gets_some_where_it_has_to(units, weights):
    counts = deal(units, weights, first=1)
    assert counts[0] >= 1
    assert sum(counts) == units
    if deal(units, weights)[0] >= 1:
        assert counts == deal(units, weights)


@given(st.integers(0, 500), st.lists(st.tuples(st.floats(0.1, 10), st.integers(0, 200)), min_size=1, max_size=8))
def test_nobody_gets_more_than_it_may(units, nodes):
    weights, most = zip(*nodes, strict=True)
    if sum(most) < units:
        with pytest.raises(ValueError, match="more than all may get"):
            deal(units, weights, most=most)
        return
    counts = deal(units, weights, most=most)
    assert sum(counts) == units
    assert all(count <= limit for count, limit in zip(counts, most, strict=True))
    open_nodes = [(n, w) for n, w, limit in zip(counts, weights, most, strict=True) if n < limit]
    slowest = max(count / weight for count, weight in zip(counts, weights, strict=True))
    assert all((count + 1) / weight >= slowest * (1 - 1e-12) for count, weight in open_nodes)


def test_spans_are_neighbours():
    assert spans([2, 0, 1], unit=4) == [range(0, 8), range(8, 8), range(8, 12)]


@pytest.mark.parametrize(
    ("head_dim", "unit"), [(128, 1), (32, 1), (64, 1), (16, 2), (24, 4), (20, 8), (36, 8), (2, 16)]
)
def test_quantised_columns_are_cut_between_blocks(head_dim, unit):
    heads = {"n_heads": 32, "n_kv_heads": 32, "head_dim": head_dim}
    assert head_unit(replace(LLAMA2_7B, **heads)) == unit
    assert head_unit(replace(LLAMA2_7B, **heads, weight_type=FloatType.F16)) == 1


@pytest.mark.parametrize(
    ("heads", "kv_heads"), [((0, 4), (0, 1)), ((2, 6), (0, 2)), ((7, 8), (1, 2)), ((4, 4), (0, 0)), ((0, 32), (0, 8))]
)
def test_the_kv_heads_that_heads_read(heads, kv_heads):
    assert kv_heads_of(LLAMA3_8B, range(*heads)) == range(*kv_heads)


def test_whole_groups_where_that_is_no_slower():
    assert deal_heads(LLAMA3_8B, [1, 1, 1]) == [range(0, 12), range(12, 24), range(24, 32)]
    assert deal_heads(LLAMA3_8B, [2, 1, 1]) == [range(0, 16), range(16, 24), range(24, 32)]


def test_groups_are_cut_where_nodes_outnumber_kv_heads():
    dealt = deal_heads(LLAMA3_8B, [1.0] * 16)
    assert [len(heads) for heads in dealt] == [2] * 16
    assert [kv_heads_of(LLAMA3_8B, heads) for heads in dealt[:3]] == [range(0, 1), range(0, 1), range(1, 2)]


def test_groups_are_cut_where_that_is_faster():
    # Two groups of two heads: in whole groups three nodes could not all take part.
    assert deal_heads(TINY, [1, 1, 1]) == [range(0, 2), range(2, 3), range(3, 4)]
    # Two groups of eight over weights of 3 and 1: whole groups would take (8 + 1) / 1, twelve and four (12 + 2) / 3.
    wide = replace(TINY, n_heads=16)
    assert deal_heads(wide, [3, 1]) == [range(0, 12), range(12, 16)]


@given(configs(), st.data())
def test_every_head_once_and_in_whole_units(config, data):
    unit = head_unit(config)
    nodes = data.draw(st.integers(1, min(config.n_heads // unit, 12)))
    weights = data.draw(st.lists(st.floats(0.5, 4), min_size=nodes, max_size=nodes))
    dealt = deal_heads(config, weights)
    assert [head for heads in dealt for head in heads] == list(range(config.n_heads))
    assert all(heads.start % unit == heads.stop % unit == 0 for heads in dealt)
    assert dealt[0]


@pytest.mark.parametrize(
    ("shape", "nodes", "message"),
    [
        ({}, 5, "5 nodes, and each needs a head of its own: the model has 4"),
        (
            {"head_dim": 16},
            3,
            "3 nodes, and the model can be dealt to 2 at most: its 4 heads of 16 values go in units ",
        ),
        ({"head_dim": 24}, 2, "2 nodes, and the model can be dealt to 1 at most"),
    ],
)
def test_more_nodes_than_heads(shape, nodes, message):
    config = replace(TINY, **shape)
    with pytest.raises(PlanError) as error:
        deal_heads(config, [1.0] * nodes)
    assert str(error.value).startswith(message)
    assert deal_heads(config, [1.0] * (config.n_heads // head_unit(config)))[-1].stop == 4
    if head_unit(config) > 1:
        assert len(deal_heads(replace(config, weight_type=FloatType.F32), [1.0] * 4)) == 4
