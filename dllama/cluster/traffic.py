"""What a token moves between the nodes, in bytes and in seconds.

The root starts a token by sending its row of the embedding, in the buffers' type, to every worker. After the attention
and after the FFN of each layer the nodes sum their parts of the residual stream, [dim] values from each: see `rounds`.
At the end every worker reduces the logits of its rows of the vocabulary to the k likeliest, and sends those.

A round takes as long as its slowest node: its link's latency, the larger of what it sends and receives at the link's
bandwidth, and what each message costs the CPU. What parts of a round could hide behind work is not counted.
"""

from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from dllama.cluster.node import NodeSpec
from dllama.cluster.rounds import Form, meetings
from dllama.cluster.share import Share
from dllama.formats import FloatType
from dllama.formats.blocks import BLOCK

MESSAGE_BYTES = 96
"""What surrounds a message's payload, rounded up: a header of a dozen bytes, two frames' lengths (2 and 9 bytes in
ZMTP), and CurveZMQ's nonce, tag and command name (33 bytes a frame)."""

MESSAGE_SECONDS, AT_SPEED = 45e-6, 28e9
"""CPU time to send a message or to take one in, and the read speed of the machine where it takes so long, in bytes a
second: AMD Zen 4, encrypted, after weights have swept the caches. By the threads' own counts (schedstat) 12 of 46 ms of
CPU time that a token took were no products on one of four emulated devices, for 256 messages; `bench.exchange`, whose
caches are warm, has 83 µs for both."""

SLOWEST = 10
"""How many times as long it takes on the slowest devices."""

CANDIDATE_BYTES = 8
"""A token id and its logit."""


class Traffic(NamedTuple):
    """Bytes that one node sends and receives, headers included."""

    sent: int
    received: int


class Round(NamedTuple):
    """What the nodes send and receive at the same time, in their order; and how many messages, in and out."""

    traffic: tuple[Traffic, ...]
    messages: tuple[int, ...]


def rounds(
    form: Form, order: Sequence[int], shares: Sequence[Share], buffer_type: FloatType, top_k: int
) -> list[tuple[Round, int]]:
    """Every round of a token, with how often it takes place; the root's share is the first. ``form``, ``order``: as of
    `meetings`.

    top_k: likeliest tokens that each node offers to the sampler; 1 is greedy, 0 sends all logits. Top-p or min-p alone
    send fewer, how many depends on the text.
    """
    if len(shares) == 1:
        return []
    if form is Form.SCATTER:
        exchange = _scatter(shares, buffer_type)
    else:
        exchange = _meet(form, order, vector_bytes(shares[0].config.dim, buffer_type))
    exchanges = 2 * shares[0].config.n_layers
    return [
        (_start(shares, buffer_type), 1),
        *((round, exchanges) for round in exchange),
        (_finish(shares, top_k), 1),
    ]


def seconds(round: Round, nodes: Sequence[NodeSpec]) -> float:
    """How long a round takes."""
    return max(
        (
            way_seconds(moved, node) + messages * message_seconds(node)
            for node, moved, messages in zip(nodes, *round, strict=True)
            if messages
        ),
        default=0.0,
    )


def way_seconds(moved: Traffic, node: NodeSpec) -> float:
    """How long what a node sends and receives is on its way."""
    return node.latency + max(moved) / node.bandwidth


def work_seconds(rounds: Sequence[tuple[Round, int]], node: int, spec: NodeSpec) -> float:
    """CPU time that a node's messages take it, of all these rounds, each as often as is told with it."""
    return sum(count * round.messages[node] for round, count in rounds) * message_seconds(spec)


def message_seconds(node: NodeSpec) -> float:
    """CPU time that a message takes a node: a device that works through weights more slowly is taken to be as much
    slower at this, within bounds. MESSAGE_SECONDS where its speed is not known."""
    return MESSAGE_SECONDS * (min(AT_SPEED / node.read_speed, SLOWEST) if node.read_speed else 1)


def vector_bytes(values: int, buffer_type: FloatType) -> int:
    """Bytes of so many values in a buffer, in whole blocks where its type has blocks."""
    return buffer_type.row_bytes(-(-values // BLOCK) * BLOCK if buffer_type.is_quantized else values)


def _start(shares: Sequence[Share], buffer_type: FloatType) -> Round:
    message = _message(vector_bytes(shares[0].config.dim, buffer_type))
    workers = len(shares) - 1
    return Round((Traffic(workers * message, 0), *[Traffic(0, message)] * workers), (workers, *[1] * workers))


def _meet(form: Form, order: Sequence[int], nbytes: int) -> list[Round]:
    message = _message(nbytes)
    counts = dict(zip(order, _counts(form, len(order)), strict=True))
    return [
        Round(
            tuple(Traffic(to * message, of * message) for to, of in round),
            tuple(to + of for to, of in round),
        )
        for round in zip(*(counts[node] for node in range(len(order))), strict=True)
    ]


@cache
def _counts(form: Form, nodes: int) -> list[list[tuple[int, int]]]:
    """How many nodes each sends to and hears of, for each place in the order and each round."""
    each = (meetings(form, range(nodes), place) for place in range(nodes))
    return [[(len(meeting.to), len(meeting.of)) for meeting in rounds] for rounds in each]


def _scatter(shares: Sequence[Share], buffer_type: FloatType) -> list[Round]:
    parts = [_message(vector_bytes(len(share.sums), buffer_type)) for share in shares]
    whole, others = sum(parts), len(parts) - 1
    owners = sum(part > 0 for part in parts)
    scatter = tuple(Traffic(whole - part, others * part) for part in parts)
    messages = tuple(owners - (part > 0) + others * (part > 0) for part in parts)
    gather = tuple(Traffic(received, sent) for sent, received in scatter)
    return [Round(scatter, messages), Round(gather, messages)]


def _finish(shares: Sequence[Share], top_k: int) -> Round:
    _, *workers = (_message(_candidates_bytes(len(share.vocab), top_k)) for share in shares)
    traffic = Traffic(0, sum(workers)), *(Traffic(size, 0) for size in workers)
    return Round(traffic, (len(workers), *[1] * len(workers)))


def _candidates_bytes(rows: int, top_k: int) -> int:
    everything = FloatType.F32.row_bytes(rows)
    return min(CANDIDATE_BYTES * top_k, everything) if top_k else everything


def _message(payload: int) -> int:
    """Bytes of a message, headers included; nothing to say needs none."""
    return payload + MESSAGE_BYTES if payload else 0
