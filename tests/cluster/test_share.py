"""What shares hold: together the whole model, and what their slices compute adds up to what the whole computes."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllama.cluster.deal import head_unit
from dllama.cluster.node import NodeSpec
from dllama.cluster.planner import make_plan
from dllama.engine.memory import RUNTIME_BYTES, kv_bytes_per_token, needed_bytes
from dllama.errors import PlanError
from dllama.formats import FloatType, tensor_layout
from tests.cluster.models import EXPERTS, LLAMA2_7B, LLAMA3_8B, TINY, configs, equal_nodes

KV_TYPES = st.sampled_from([FloatType.F16, FloatType.F32, FloatType.Q80])


@st.composite
def plans(draw):
    """Any model over any number of nodes with shares of any size."""
    config = draw(configs())
    count = draw(st.integers(1, min(config.n_heads // head_unit(config), 9)))
    ratios = draw(st.lists(st.floats(0.2, 5), min_size=count, max_size=count))
    return make_plan(config, equal_nodes(count), ratios)


@given(plans())
def test_everything_is_held_exactly_once_and_kv_heads_where_they_are_read(plan):
    config = plan.config
    for name, units in (
        ("heads", config.n_heads),
        ("hidden", config.ffn_dim),
        ("vocab", config.vocab_size),
        ("sums", config.dim),
    ):
        assert [unit for share in plan.shares for unit in getattr(share, name)] == list(range(units))
    assert {head for share in plan.shares for head in share.kv_heads} == set(range(config.n_kv_heads))
    for share in plan.shares:
        assert all(block.start % 32 == 0 for block in (share.hidden, share.sums) if block)
        read = [share.kv_heads[own] for own in share.kv_head_of]
        assert read == [head * config.n_kv_heads // config.n_heads for head in share.heads]
        assert set(read) == set(share.kv_heads)


@given(plans())
def test_slices_tile_every_tensor(plan):
    for tensor in tensor_layout(plan.config):
        times = np.zeros((tensor.rows, tensor.columns), int)
        for share in plan.shares:
            rows, columns = share.slices[tensor.kind]
            times[rows.start : rows.stop, columns.start : columns.stop] += 1
            if tensor.float_type.is_quantized and rows:
                assert columns.start % 32 == columns.stop % 32 == 0
        if tensor.is_whole:
            assert (times == len(plan.shares)).all()
        elif tensor.name in ("k", "v"):
            assert (times >= 1).all()
        else:
            assert (times == 1).all()


@given(plans(), KV_TYPES, st.integers(1, 600))
def test_memory_sums_up(plan, kv_type, context):
    config = plan.config
    tensors = list(tensor_layout(config))
    embedding = min(context, config.vocab_size) * 4 * config.dim
    copies = Counter(head for share in plan.shares for head in share.kv_heads)
    extra = sum(copies.values()) - config.n_kv_heads  # kv heads that are held once more
    nodes = len(plan.shares)
    expected = {"whole": nodes, "k": 1 + extra / config.n_kv_heads, "v": 1 + extra / config.n_kv_heads}
    weights = sum(
        tensor.nbytes * expected.get("whole" if tensor.is_whole else tensor.name, 1)
        for tensor in tensors
        if tensor.name != "embedding"
    )
    assert sum(share.weight_bytes for share in plan.shares) == round(weights)
    per_head = kv_bytes_per_token(config, kv_type) // config.n_kv_heads
    kv_bytes = sum(share.kv_bytes_per_position(kv_type) for share in plan.shares)
    assert kv_bytes == (config.n_kv_heads + extra) * per_head
    needed = sum(share.memory_bytes(context, kv_type) for share in plan.shares)
    assert needed == nodes * RUNTIME_BYTES + embedding + round(weights) + context * kv_bytes


@given(configs(), KV_TYPES, st.integers(1, 600))
def test_one_node_needs_what_it_needs_without_a_plan(config, kv_type, context):
    (share,) = make_plan(config, equal_nodes(1)).shares
    assert share.memory_bytes(context, kv_type) == needed_bytes(config, context, kv_type)


def test_the_slices_of_llama_3_on_three_nodes():
    plan = make_plan(LLAMA3_8B, equal_nodes(3))
    last = plan.shares[2].slices
    assert last["q"] == (range(24 * 128, 32 * 128), range(4096))
    assert last["k"] == last["v"] == (range(6 * 128, 8 * 128), range(4096))
    assert last["o"] == (range(4096), range(24 * 128, 32 * 128))
    assert last["w1"] == last["w3"] == (range(299 * 32, 14336), range(4096))
    assert last["w2"] == (range(4096), range(299 * 32, 14336))
    assert last["output"] == (range(2 * 42752, 128256), range(4096))
    assert last["attention_norm"] == last["final_norm"] == (range(1), range(4096))
    assert not last["embedding"].rows
    assert plan.shares[0].slices["embedding"] == (range(128256), range(4096))


def test_the_bytes_of_llama_2_on_two_nodes():
    share = make_plan(LLAMA2_7B, equal_nodes(2)).shares[1]
    attention = 32 * (4 * 2048 * 4096 // 32 * 18 + 4 * 4096)
    ffn = 32 * (3 * 5504 * 4096 // 32 * 18 + 4 * 4096)
    assert share.segment_bytes == {"attention": attention, "ffn": ffn, "output": 16000 * 4096 // 32 * 18 + 4 * 4096}
    assert share.kv_bytes_per_position(FloatType.F16) == 2 * 32 * 2048 * 2


def test_the_bytes_of_a_mixture_of_experts_on_two_nodes():
    """A node holds its blocks of all six experts, and reads those of two for a token; the router it has whole."""
    share = make_plan(EXPERTS, equal_nodes(2)).shares[0]
    assert share.hidden == range(96)
    assert share.slices["w1"] == share.slices["w3"] == (range(96), range(64))
    assert share.slices["w2"] == (range(64), range(96))
    assert share.slices["router"] == (range(6), range(64))
    expert, rest = 3 * 96 * 64 // 32 * 18, 4 * 64 + 4 * 6 * 64
    assert share.segment_bytes["ffn"] == 2 * (2 * expert + rest)
    assert share.weight_bytes == sum(share.segment_bytes.values()) + 2 * 4 * expert


@settings(max_examples=50)
@given(plans(), st.integers(0, 2**32 - 1))
def test_parts_add_up_to_the_whole(plan, seed):
    """One layer at one position on made-up keys and values: attention then is a product for each head."""
    config, rng = plan.config, np.random.default_rng(seed)
    matrices = {
        tensor.kind: rng.standard_normal((tensor.rows, tensor.columns))
        for tensor in tensor_layout(replace(config, n_layers=1))
        if tensor.kind in ("q", "k", "v", "o", "w1", "w2", "w3")
    }
    x = rng.standard_normal(config.dim)
    group = config.n_heads // config.n_kv_heads

    def attention(m, kv_head_of):
        q, k, v = (rows.reshape(-1, config.head_dim) for rows in (m["q"] @ x, m["k"] @ x, m["v"] @ x))
        kv = list(kv_head_of)
        return m["o"] @ (np.tanh((q * k[kv]).sum(axis=1, keepdims=True)) * v[kv]).ravel()

    def ffn(m):
        return m["w2"] @ (np.tanh(m["w1"] @ x) * (m["w3"] @ x))

    parts = []
    for share in plan.shares:
        own = {
            name: matrix[share.slices[name].rows][:, share.slices[name].columns] for name, matrix in matrices.items()
        }
        parts.append((attention(own, share.kv_head_of), ffn(own)))
    summed = np.sum(parts, axis=0)
    whole = (attention(matrices, (head // group for head in range(config.n_heads))), ffn(matrices))
    np.testing.assert_allclose(summed, whole, rtol=1e-9, atol=1e-9 * np.abs(whole).max())


@pytest.mark.parametrize(
    ("figures", "message"),
    [
        ({"name": ""}, "a node without a name"),
        ({"read_speed": 0}, "node a: a read speed of 0 is impossible"),
        ({"read_speed": float("nan")}, "node a: a read speed of nan is impossible"),
        ({"memory": -1}, "node a: a memory of -1 is impossible"),
        ({"threads": 0}, "node a: a thread count of 0 is impossible"),
        ({"bandwidth": 0}, "node a: a bandwidth of 0 is impossible"),
        ({"latency": -0.1}, "node a: a latency of -0.1 is impossible"),
    ],
)
def test_figures_that_no_device_has(figures, message):
    with pytest.raises(PlanError) as error:
        NodeSpec(**{"name": "a", **figures})
    assert str(error.value) == message


def test_a_share_of_a_tiny_model():
    share = make_plan(TINY, equal_nodes(3)).shares[1]
    assert (share.heads, share.kv_heads, share.kv_head_of) == (range(2, 3), range(1, 2), (0,))
    assert (share.hidden, share.vocab, share.sums) == (range(64, 128), range(171, 342), range(32, 64))
