"""`dllama plan`: what it prints of shares, memory, bytes and times, and what it says of nodes that make no sense."""

import json

import pytest

from dllama.cluster.node import NodeSpec
from dllama.cluster.planner import make_plan
from dllama.engine.memory import in_units
from dllama.formats import FloatType
from dllama.formats.header import pack_header
from dllama.formats.layout import weights_bytes
from tests.cli.program import fails, succeeds
from tests.cluster.models import LLAMA2_7B, QWEN3_30B_A3B


@pytest.fixture(scope="module")
def large_model(tmp_path_factory):
    """A file with the shape of Llama 2 7B."""
    return without_weights(tmp_path_factory.mktemp("models") / "7b.m", LLAMA2_7B)


def without_weights(path, config):
    """A file of a model's size: it takes no room on a disk."""
    header = pack_header(config)
    with open(path, "wb") as file:
        file.write(header)
        file.truncate(len(header) + weights_bytes(config))
    return path


def plan(*args) -> dict:
    return json.loads(succeeds("plan", *args, "--json"))


def test_the_plan_as_json(large_model):
    values = plan(
        *("--model", large_model, "--count", 2, "--speed", "4GB/s", "--link", "1gbit", "--latency", "0.2ms"),
        *("--memory", "4GiB", "--context", 2048),
    )
    nodes = [NodeSpec(f"node{i}", read_speed=4e9, memory=4 << 30) for i in (1, 2)]
    expected = make_plan(LLAMA2_7B, nodes, context=2048)
    assert values["file"] == str(large_model)
    assert values["model"]["n_heads"] == 32
    assert [node["heads"] for node in values["nodes"]] == [[0, 16], [16, 32]]
    assert [node["ffn_blocks"] for node in values["nodes"]] == [[0, 172], [172, 344]]
    for node, share, traffic in zip(values["nodes"], expected.shares, expected.traffic, strict=True):
        assert node["memory_bytes"] == share.memory_bytes(2048, FloatType.F16)
        assert (node["sent_bytes"], node["received_bytes"]) == traffic
        assert max(traffic) <= 290_000
    assert values["exchange"] == "full mesh"
    assert values["token_ms"] == pytest.approx(1000 * expected.step_seconds())
    assert values["last_token_ms"] == pytest.approx(1000 * expected.step_seconds(2047))
    assert values["assumed"] == values["left_out"] == []


def test_a_mixture_of_experts_is_held_whole_and_read_in_part(tmp_path):
    """Qwen3 30B-A3B: 30.5 billion weights, 3.3 of which a token meets, 0.3 of them in the embedding.

    Each node has the routers whole.
    """
    model = without_weights(tmp_path / "30b.m", QWEN3_30B_A3B)
    arguments = ("--model", model, "--count", 2, "--speed", "4GB/s", "--context", 2048)
    values = plan(*arguments)
    assert [node["ffn_blocks"] for node in values["nodes"]] == [[0, 12], [12, 24]]
    assert sum(node["weight_bytes"] for node in values["nodes"]) == pytest.approx(30.2e9 * 18 / 32, rel=0.02)
    routers = 48 * 128 * 2048 * 4
    assert values["read_ms"] == pytest.approx((3.0e9 * 18 / 32 / 2 + routers) / 4e6, rel=0.02)
    assert "hidden dim 768 of each of 128 experts, 8 at a time" in succeeds("plan", *arguments)
    info = json.loads(succeeds("info", model, "--json"))
    assert info["parameters"] == pytest.approx(30.5e9, rel=0.01)
    assert info["parts"]["routers"] == routers
    assert sum(info["parts"].values()) == pytest.approx(info["bytes"], abs=200)


def test_the_plan_as_tables(large_model):
    text = succeeds("plan", "--model", large_model, "--count", 3, "--device", "pi4", "--memory", "4GiB")
    lines = [" ".join(line.split()) for line in text.splitlines()]
    expected = make_plan(LLAMA2_7B, [NodeSpec(f"node{i}", read_speed=4e9) for i in (1, 2, 3)])
    root, _, last = (in_units(share.memory_bytes(4096, FloatType.F16)) for share in expected.shares)
    assert lines[0].startswith(f"{large_model}: llama, 32 layers, dim 4096")
    assert lines[1] == "context 4096, KV cache in f16, buffers in q80"
    assert "node heads kv heads ffn blocks vocabulary weights kv cache memory available" in lines
    assert f"node1 11 11 115 10667 1.25 GB 738.2 MB {root} 4.29 GB" in lines
    assert f"node3 10 10 114 10666 1.21 GB 671.1 MB {last} 4.29 GB" in lines
    assert "node1 578.2 kB 569.6 kB 313.7 ms" in lines
    ms, last = (1000 * expected.step_seconds(position) for position in (0, 4095))
    assert f"expected: {ms:.1f} ms a token, {1000 / ms:.2f} tokens/s; {last:.1f} ms at the end of the context" in lines
    exchange = f"{1000 * expected.exchange_seconds:.1f} ms in exchanges (full mesh)"
    assert f"of these: 313.7 ms reading weights, {exchange}" in lines
    assert lines[-3:] == [
        "assumed: pi4 reads 4 GB/s (published memory bandwidth, about 4 GB/s)",
        "assumed: links carry 1 Gbit/s each way",
        "assumed: messages take 0.2 ms to arrive",
    ]


@pytest.mark.parametrize(
    "args",
    [
        ("--nodes", "a=8GB/s:6GiB:100mbit:1ms", "10.0.0.2:9998=pi4"),
        ("--nodes", "a=1ms:100mbit:6GiB:8GB/s,10.0.0.2:9998=PI4"),
        ("--nodes", "a=8 gb/s:6gib:100Mbit:1ms", "--nodes", "10.0.0.2:9998=4GB/s"),
        ("--nodes=a=8GB/s:6GiB:100mbit:1000us", "10.0.0.2:9998", "--device", "pi4"),
        ("--nodes", "a=8000MB/s:6GiB:100mbit:.001s", "10.0.0.2:9998", "--speed", "4GB/s"),
    ],
)
def test_nodes_can_be_written_in_several_ways(large_model, args):
    a, b = plan(*args, "--model", large_model, "--ratios", "3:1")["nodes"]
    assert (a["name"], b["name"]) == ("a", "10.0.0.2:9998")
    assert (a["read_speed"], a["free_bytes"], a["bandwidth"], a["latency_ms"]) == (8e9, 6 << 30, 12.5e6, 1)
    assert (b["read_speed"], b["free_bytes"], b["bandwidth"], b["latency_ms"]) == (4e9, None, 125e6, 0.2)
    assert (a["heads"], b["heads"]) == ([0, 24], [24, 32])


def test_the_embedded_model_without_speeds():
    options = ("--nodes", "desk", "shelf", "attic", "--ratios", "2:1:1", "--buffer-float-type", "f32")
    values = plan(*options)
    desk, shelf, attic = (end - start for start, end in (node["heads"] for node in values["nodes"]))
    assert desk > shelf >= attic > 0
    assert desk + shelf + attic == values["model"]["n_heads"]
    assert values["token_ms"] is None
    advice = "in exchanges (full mesh); for the time of a token give --speed or --device"
    assert any(line.endswith(advice) for line in succeeds("plan", *options).splitlines())


def test_nodes_that_do_not_help_are_named(small_model):
    values = plan("--model", small_model, "--count", 2, "--device", "pi5")
    assert [node["name"] for node in values["nodes"]] == ["node1"]
    (left,) = values["left_out"]
    assert left["name"] == "node2"
    assert left["reason"].startswith("it is too slow to help: a token takes ")
    text = succeeds("plan", "--model", small_model, "--count", 2, "--device", "pi5")
    assert f"node2 is left out: {left['reason']}" in text.splitlines()


def test_all_logits_take_more(small_model):
    options = ("--model", small_model, "--nodes", "a", "b")
    one, forty, everything = (plan(*options, "--topk", k)["nodes"][0]["received_bytes"] for k in (1, 40, 0))
    assert (forty - one, everything - one) == (40 * 8 - 8, 150 * 4 - 8)


def test_a_quantised_cache_takes_less(small_model):
    f16, q80 = (
        plan("--model", small_model, "--count", 2, "--kv-float-type", kind)["nodes"][0]["kv_bytes_per_position"]
        for kind in ("f16", "q80")
    )
    assert (f16, q80) == (2 * 2 * 64, 2 * 2 * 34)  # a kv head of 16 values, padded to 32


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("--count", 3), "3 nodes, and the model can be dealt to 2 at most: its 4 heads of 16 values go in units of 2"),
        (("--nodes", "a", "b", "a"), "node a is given twice"),
        (("--nodes", "a", "b", "--ratios", "1:2:3"), "3 ratios for the nodes a, b: each needs one, the root's first"),
        (("--nodes", "a", "b", "--ratios", "1:0"), "node b: its ratio is 0, and has to be a number above 0"),
        (("--nodes", "a=pi4", "b"), "the read speed of node b is not known, and that of others is: give all or none"),
        (("--nodes", "a=0GB/s"), "node a: a read speed of 0.0 is impossible"),
        (("--count", 1, "--context", 129), "a context of 129 tokens, and the model's is 128"),
        (
            ("--count", 2, "--memory", "100MB"),
            "not enough memory for a context of 128 tokens: node node1 needs 150.1 MB (",
        ),
        (("--count", 1, "--model", "none.m"), "none.m: no such file or folder"),
    ],
)
def test_plans_that_cannot_be_made(small_model, args, message):
    assert fails("plan", "--model", small_model, *args).startswith(message)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ((), "either --nodes or --count is needed"),
        (("--nodes", "a", "--count", 2), "either --nodes or --count is needed"),
        (("--nodes",), "Option '--nodes' requires an argument"),
        (("--nodes", "--json"), "Option '--nodes' requires an argument"),
        (
            ("--nodes", "a=fast"),
            "node a: 'fast' is not a speed (4GB/s), memory (2GiB), link (1gbit), latency (0.2ms) or",
        ),
        (("--nodes", "a=1GB:2GB"), "node a: memory is given twice"),
        (("--nodes", "=4GB/s"), "'=4GB/s' is not a node such as desk"),
        (("--nodes", "a="), "'a=' is not a node such as desk"),
        (("--nodes", "a,,b"), "'' is not a node such as desk"),
        (("--nodes", "a=4GB/s,2GiB"), "'2GiB' is no name for a node; what is known of one is joined by colons"),
        (("--count", 0), "0 is not in the range"),
        (("--count", 2, "--ratios", "1:x"), "'1:x' is not a list of numbers such as 2:1:1"),
        (("--count", 2, "--link", "1"), "'1' is not a bandwidth such as 1gbit"),
        (("--count", 2, "--speed", "9" * 400 + "GB/s"), "is not a speed such as 4GB/s"),
        (("--count", 2, "--latency", "-1ms"), "'-1ms' is not a time such as 0.2ms"),
        (("--count", 2, "--device", "pi3"), "'pi3' is not one of 'pi4', 'pi5'"),
        (("elsewhere", "--count", 2), "Got unexpected extra argument (elsewhere)"),
    ],
)
def test_a_command_line_without_sense(args, message):
    assert message in fails("plan", *args, status=2)


def test_help_has_examples():
    assert "\n    dllama plan --model model.m --count 4 --device pi4" in succeeds("plan", "--help")


def test_heads_of_16_values_are_dealt_in_pairs(small_model):
    assert [node["heads"] for node in plan("--model", small_model, "--nodes", "a", "b")["nodes"]] == [[0, 2], [2, 4]]
