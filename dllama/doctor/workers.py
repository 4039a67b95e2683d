"""The workers as this machine reaches them: whether they can be used, over what link, and for which model."""

import secrets
from collections.abc import Iterator, Sequence

from dllama.cluster.key import ClusterKey
from dllama.cluster.node import NodeSpec
from dllama.cluster.planner import make_plan
from dllama.cluster.recruit import dismiss, recruit
from dllama.doctor.device import BUFFER_TYPE, KV_TYPE
from dllama.doctor.finding import Finding, State
from dllama.engine.memory import in_units
from dllama.errors import ClusterError, PlanError
from dllama.formats import ModelFile
from dllama.kernels.team import in_threads

CONNECT_SECONDS = 5.0
SLOW_LINK = 50e6
"""Bytes a second: well below what gigabit Ethernet carries, well above what 100 Mbit/s can."""
LONG_TRIP = 2e-3
"""Seconds there and back: more than any switch takes."""

COPY_KEY = "copy this machine's key file there, readable by its owner alone, and restart the worker"
SERVES_EDGES = "this worker serves edges"
"""How a cloud's refusal begins; it has looked at the key and the version before."""
SAME_VERSION = "install the same version of dllama on all nodes, and restart the workers"

FAULTS = (
    ("no such host", "reach", "check the name, or give the address"),
    ("no address such as", "reach", "give HOST or HOST:PORT"),
    ("nothing listens", "reach", "there: dllama worker, or sudo systemctl restart dllama-worker@9998"),
    ("no answer within", "reach", "check that the device is on, its cable is in, and no firewall is in the way"),
    ("does not answer", "reach", "there: sudo systemctl restart dllama-worker@9998"),
    ("another cluster key", "key", COPY_KEY),
    ("asks for the cluster key", "key", "leave out --insecure"),
    ("runs with --insecure", "key", "start the worker without --insecure"),
    ("runs dllama", "version", SAME_VERSION),
    ("protocol", "version", SAME_VERSION),
)
"""A piece of the error, the check that it is the result of, and what to do."""

MISFITS = (
    ("not enough memory", "more nodes, more memory, a smaller model, or a shorter context with --max-seq-len"),
    ("a context of", "a shorter context with --max-seq-len"),
)
"""A piece of the plan's error, and what to do; any other is that the model has too few heads."""
FEWER = "leave out workers, or take a model with more heads"


def worker_findings(address: str, key: ClusterKey | None) -> tuple[NodeSpec | None, list[Finding]]:
    """One worker: what the plan has to know of it, None where it cannot be used; and what was found."""
    willing, errors = recruit([address], key, secrets.token_bytes(16), CONNECT_SECONDS)
    dismiss(willing)
    if errors:
        return None, [_fault(address, errors[0])]
    spec = willing[0].spec
    speed = "?" if spec.read_speed is None else f"{spec.read_speed / 1e9:.1f}"
    return spec, [
        Finding(address, "reach", State.OK, "answers, and has the same key and version"),
        _link(address, spec),
        _round_trip(address, willing[0].round_trip),
        Finding(
            address,
            "speed",
            State.OK,
            f"{speed} GB of weights a second with {in_threads(spec.threads)}",
            value=spec.read_speed,
        ),
        memory(address, spec),
    ]


def memory(node: str, spec: NodeSpec) -> Finding:
    """What is free there; whether it is enough is for `plan_findings`."""
    free = "?" if spec.memory is None else in_units(spec.memory)
    return Finding(node, "memory", State.OK, f"{free} free", value=spec.memory)


def plan_findings(model: ModelFile, context: int, nodes: Sequence[NodeSpec]) -> Iterator[Finding]:
    """Whether the nodes, the root first, hold a model together."""
    try:
        plan = make_plan(model.config, nodes, context=context, kv_type=KV_TYPE, buffer_type=BUFFER_TYPE)
    except PlanError as error:
        advice = next((advice for piece, advice in MISFITS if piece in str(error)), FEWER)
        yield Finding(nodes[0].name, "model", State.WRONG, f"{model.path.name}: {error}", advice)
        return
    for share in plan.shares:
        needed = share.memory_bytes(context, KV_TYPE)
        percent = 100 * len(share.heads) / model.config.n_heads
        text = f"{model.path.name}: {percent:.0f} % of the heads, {in_units(needed)} of memory"
        yield Finding(share.node.name, "model", State.OK, text, value=needed)
    for node, reason in plan.left_out:
        text = f"{model.path.name}: is left out: {reason}"
        advice = "end what else runs there" if "memory" in reason else "do without it, or give shares with --ratios"
        yield Finding(node.name, "model", State.SLOW, text, advice)


def _fault(address: str, error: ClusterError) -> Finding:
    text = str(error).removeprefix(f"worker {address}: ")
    if text.startswith(SERVES_EDGES):
        told = "answers, and has the same key and version; it is a cloud for edges, and no part of a cluster"
        advice = f"dllama inference --mode privatelora --workers {address} uses it"
        return Finding(address, "reach", State.OK, told, advice)
    if "busy" in text:
        advice = "run this again when it is free; systemctl status dllama-worker@9998 there tells what it does"
        return Finding(address, "reach", State.UNKNOWN, text, advice)
    for piece, check, advice in FAULTS:
        if piece in text:
            return Finding(address, check, State.WRONG, text, advice)
    return Finding(address, "reach", State.WRONG, text, "there: journalctl -u dllama-worker@9998 tells more")


def _link(address: str, spec: NodeSpec) -> Finding:
    text = f"{8 * spec.bandwidth / 1e6:.0f} Mbit/s"
    if spec.bandwidth >= SLOW_LINK:
        return Finding(address, "link", State.OK, text, value=spec.bandwidth)
    advice = "use gigabit Ethernet; where it is that, try another cable or port: ethtool eth0 tells what was agreed on"
    return Finding(address, "link", State.SLOW, f"{text}, which is slow for a cluster", advice, spec.bandwidth)


def _round_trip(address: str, seconds: float) -> Finding:
    text = f"{1e3 * seconds:.2f} ms"
    if seconds <= LONG_TRIP:
        return Finding(address, "round trip", State.OK, text, value=seconds)
    text += ", and a token takes two of them for each layer"
    return Finding(address, "round trip", State.SLOW, text, "use a cable in place of Wi-Fi, and one switch", seconds)
