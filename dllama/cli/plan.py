"""`dllama plan`: who would hold what of a model, and how fast it would run, before anything is loaded."""

import json

import click

from dllama.cli import options, quantities
from dllama.cli.info import table
from dllama.cli.node_options import DEVICES, NodeList, Ratios, SeveralValues
from dllama.cli.quantities import Quantity
from dllama.cli.shape import describe, shape
from dllama.cluster.node import NodeSpec
from dllama.cluster.plan import Plan
from dllama.cluster.planner import make_plan
from dllama.cluster.share import Share
from dllama.engine.memory import in_units
from dllama.formats.blocks import FloatType


@click.command(cls=SeveralValues)
@click.option("--model", metavar="FILE", help="Model file (.m). [default: the small embedded model]")
@click.option(
    "--nodes",
    type=NodeList(),
    multiple=True,
    metavar="NAME[=...] ...",
    help="The nodes, the root first, each with what is known of it: NAME=4GB/s:2GiB:1gbit:0.2ms, in any order.",
)
@click.option("--count", type=click.IntRange(1, 4096), metavar="N", help="So many equal nodes in place of --nodes.")
@click.option(
    "--speed",
    type=Quantity("speed", quantities.BYTES_PER_SECOND, "4GB/s"),
    metavar="X",
    help="Bytes of weights that a node works through in a second, such as 4GB/s; of nodes that do not say.",
)
@click.option(
    "--device", type=click.Choice(tuple(DEVICES), case_sensitive=False), help="What the nodes are, in place of --speed."
)
@click.option(
    "--memory",
    type=Quantity("memory size", quantities.BYTES, "2GiB"),
    metavar="X",
    help="Free memory of nodes that do not say, such as 2GiB. [default: enough]",
)
@click.option(
    "--link",
    type=Quantity("bandwidth", quantities.LINK, "1gbit"),
    metavar="X",
    help=f"Bandwidth of their links. [default: {8 * NodeSpec.bandwidth / 1e9:g}gbit]",
)
@click.option(
    "--latency",
    type=Quantity("time", quantities.SECONDS, "0.2ms"),
    metavar="X",
    help=f"From a message's sending to its arrival. [default: {1000 * NodeSpec.latency:g}ms]",
)
@click.option(
    "--ratios", type=Ratios(), metavar="A:B:...", help="Shares, such as 2:1:1. [default: in proportion to speeds]"
)
@click.option(
    "--context", type=click.IntRange(min=1), metavar="N", help="Context in tokens. [default: the model's own]"
)
@options.buffer_float_type("Of what travels between the nodes.")
@options.kv_float_type("Type of the KV cache.")
@click.option(
    "--topk",
    type=click.IntRange(min=0),
    default=1,
    show_default=True,
    metavar="K",
    help="Likeliest tokens that each node offers to the sampler: 1 is enough for greedy; 0 sends all logits.",
)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def plan(model, nodes, count, ratios, context, buffer_float_type, kv_float_type, topk, as_json, **defaults) -> None:
    """Show how a model would be shared out over several nodes, and what to expect of them.

    For each node: its heads, FFN blocks and rows of the vocabulary, the memory it needs, the bytes it sends and
    receives for a token; then the expected time of a token. Nothing is loaded and nothing is sent.

    \b
      dllama plan --model model.m --count 4 --device pi4 --memory 3GiB
      dllama plan --model model.m --nodes desk=20GB/s:8GiB shelf=pi4:2GiB attic=pi5:4GiB:100mbit
      dllama plan --model model.m --nodes desk shelf attic --ratios 2:1:1 --context 2048 --json
    """
    if (count is None) == (not nodes):
        raise click.UsageError("either --nodes or --count is needed")
    told = [node for value in nodes for node in value] or [(f"node{i}", {}) for i in range(1, count + 1)]
    assumed = []
    specs = [_node(name, fields, defaults, assumed) for name, fields in told]
    with options.open_model_file(model) as file:
        path, config = file.path, file.config
    result = make_plan(
        config,
        specs,
        ratios,
        context=context,
        kv_type=FloatType.parse(kv_float_type),
        buffer_type=FloatType.parse(buffer_float_type),
        top_k=topk,
    )
    values = {"file": str(path), **plan_values(result), "assumed": list(dict.fromkeys(assumed))}
    click.echo(json.dumps(values, indent=2, ensure_ascii=False) if as_json else f"{path}: {_text(result, values)}")


def _node(name: str, fields: dict, defaults: dict, assumed: list[str]) -> NodeSpec:
    """The node that the options describe; what nobody told is added to ``assumed``."""
    speed, device = fields.get("read_speed"), fields.get("device")
    if speed is None and device is None:
        speed, device = defaults["speed"], defaults["device"]
    if speed is None and device is not None:
        speed = DEVICES[device].read_speed
        assumed.append(f"{device} reads {speed / 1e9:g} GB/s ({DEVICES[device].source})")
    memory = fields.get("memory", defaults["memory"])
    bandwidth = fields.get("bandwidth", defaults["link"])
    if bandwidth is None:
        bandwidth = NodeSpec.bandwidth
        assumed.append(f"links carry {8 * bandwidth / 1e9:g} Gbit/s each way")
    latency = fields.get("latency", defaults["latency"])
    if latency is None:
        latency = NodeSpec.latency
        assumed.append(f"messages take {1000 * latency:g} ms to arrive")
    memory = None if memory is None else int(memory)
    return NodeSpec(name, read_speed=speed, memory=memory, bandwidth=bandwidth, latency=latency)


def plan_values(plan: Plan) -> dict:
    """All that the command tells of a plan. Ranges are [first, end], sizes in bytes, times for a token in ms."""
    return {
        "model": shape(plan.config),
        "context": plan.context,
        "kv_float_type": plan.kv_type.name.lower(),
        "buffer_float_type": plan.buffer_type.name.lower(),
        "top_k": plan.top_k,
        "nodes": [_share_values(plan, i, share) for i, share in enumerate(plan.shares)],
        "left_out": [{"name": node.name, "reason": reason} for node, reason in plan.left_out],
        "exchange": plan.form.value if len(plan.shares) > 1 else None,
        "exchange_ms": 1000 * plan.exchange_seconds,
        "read_ms": _ms(plan.read_seconds()),
        "token_ms": _ms(plan.step_seconds()),
        "last_token_ms": _ms(plan.step_seconds(plan.context - 1)),
    }


def _share_values(plan: Plan, index: int, share: Share) -> dict:
    node, traffic = share.node, plan.traffic[index]
    spans = {name: getattr(share, name) for name in ("heads", "kv_heads", "ffn_blocks", "vocab")}
    return {
        "name": node.name,
        "read_speed": node.read_speed,
        "free_bytes": node.memory,
        "bandwidth": node.bandwidth,
        "latency_ms": 1000 * node.latency,
        **{name: [span.start, span.stop] for name, span in spans.items()},
        "weight_bytes": share.weight_bytes,
        "kv_bytes_per_position": share.kv_bytes_per_position(plan.kv_type),
        "memory_bytes": share.memory_bytes(plan.context, plan.kv_type),
        "sent_bytes": traffic.sent,
        "received_bytes": traffic.received,
        "read_ms": None if node.read_speed is None else _ms(sum(plan.segment_seconds(share))),
    }


def _ms(seconds: float | None) -> float | None:
    return None if seconds is None else 1000 * seconds


def _text(plan: Plan, values: dict) -> str:
    shares = [("node", "heads", "kv heads", "ffn blocks", "vocabulary", "weights", "kv cache", "memory", "available")]
    loads = [("each token", "sent", "received", "reads in")]
    for node, share in zip(values["nodes"], plan.shares, strict=True):
        counts = (str(len(span)) for span in (share.heads, share.kv_heads, share.ffn_blocks, share.vocab))
        kv_bytes = plan.context * node["kv_bytes_per_position"]
        sizes = map(in_units, (node["weight_bytes"], kv_bytes, node["memory_bytes"]))
        free = "?" if node["free_bytes"] is None else in_units(node["free_bytes"])
        shares.append((node["name"], *counts, *sizes, free))
        read = "?" if node["read_ms"] is None else f"{node['read_ms']:.1f} ms"
        sent, received = (f"{node[key] / 1000:.1f} kB" for key in ("sent_bytes", "received_bytes"))
        loads.append((node["name"], sent, received, read))
    return "\n".join(
        (
            describe(plan.config),
            f"context {plan.context}, KV cache in {values['kv_float_type']}, buffers in {values['buffer_float_type']}",
            f"\n{table(shares)}\n\n{table(loads)}\n",
            _expectation(plan, values),
            *(f"{node.name} is left out: {reason}" for node, reason in plan.left_out),
            *(f"assumed: {line}" for line in values["assumed"]),
        )
    )


def _expectation(plan: Plan, values: dict) -> str:
    form = f" ({plan.form.value})" if len(plan.shares) > 1 else ""
    exchange = f"{values['exchange_ms']:.1f} ms in exchanges{form}"
    if values["token_ms"] is None:
        return f"expected: {exchange}; for the time of a token give --speed or --device"
    return (
        f"expected: {values['token_ms']:.1f} ms a token, {1000 / values['token_ms']:.2f} tokens/s; "
        f"{values['last_token_ms']:.1f} ms at the end of the context\n"
        f"of these: {values['read_ms']:.1f} ms reading weights, {exchange}"
    )
