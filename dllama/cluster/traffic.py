"""What a token moves between the nodes, in bytes and in seconds.

The root starts a token by sending its row of the embedding, in the buffers' type, to every worker. After the attention
and after the FFN of each layer the nodes sum their parts of the residual stream, [dim] values from each, in one of two
forms:

**full mesh**: everyone sends its whole part to everyone else, and sums by itself. One round.
**reduce-scatter and all-gather**: everyone sends to each node the values that this one sums, then gets its sums. Two
rounds, of 2/n of the bytes each node would send to the mesh.

At the end every worker reduces the logits of its rows of the vocabulary to the k likeliest, and sends those; or all of
its logits, where that takes no more bytes.

A round takes as long as its slowest node: its link's latency, and the larger of what it sends and receives at the
link's bandwidth. What parts of a round could hide behind work is not counted.
"""

import enum
from collections.abc import Sequence
from typing import NamedTuple

from dllama.cluster.node import NodeSpec
from dllama.cluster.share import Share
from dllama.formats import FloatType
from dllama.formats.blocks import BLOCK

MESSAGE_BYTES = 96
"""What surrounds a message's payload, rounded up: a header of a dozen bytes, two frames' lengths (2 and 9 bytes in
ZMTP), and CurveZMQ's nonce, tag and command name (33 bytes a frame)."""

CANDIDATE_BYTES = 8
"""A token id and its logit."""


class Form(enum.Enum):
    """How parts of the residual stream are summed."""

    MESH = "full mesh"
    SCATTER = "reduce-scatter and all-gather"


class Traffic(NamedTuple):
    """Bytes that one node sends and receives, headers included."""

    sent: int
    received: int


Round = tuple[Traffic, ...]
"""What each node sends and receives at the same time, in the nodes' order."""


def rounds(form: Form, shares: Sequence[Share], buffer_type: FloatType, top_k: int) -> list[tuple[Round, int]]:
    """Every round of a token, with how often it takes place; the root's share is the first.

    top_k: likeliest tokens that each node offers to the sampler; 1 is greedy, 0 sends all logits. Top-p or min-p alone
    send fewer, how many depends on the text.
    """
    if len(shares) == 1:
        return []
    exchange = _mesh(shares, buffer_type) if form is Form.MESH else _scatter(shares, buffer_type)
    exchanges = 2 * shares[0].config.n_layers
    return [
        (_start(shares, buffer_type), 1),
        *((part, exchanges) for part in exchange),
        (_finish(shares, top_k), 1),
    ]


def seconds(round: Round, nodes: Sequence[NodeSpec]) -> float:
    """How long a round takes."""
    busy = ((node, max(moved)) for node, moved in zip(nodes, round, strict=True) if any(moved))
    return max((node.latency + nbytes / node.bandwidth for node, nbytes in busy), default=0.0)


def vector_bytes(values: int, buffer_type: FloatType) -> int:
    """Bytes of so many values in a buffer, in whole blocks where its type has blocks."""
    return buffer_type.row_bytes(-(-values // BLOCK) * BLOCK if buffer_type.is_quantized else values)


def _start(shares: Sequence[Share], buffer_type: FloatType) -> Round:
    message = _message(vector_bytes(shares[0].config.dim, buffer_type))
    workers = len(shares) - 1
    return (Traffic(workers * message, 0), *[Traffic(0, message)] * workers)


def _mesh(shares: Sequence[Share], buffer_type: FloatType) -> list[Round]:
    nbytes = (len(shares) - 1) * _message(vector_bytes(shares[0].config.dim, buffer_type))
    return [(Traffic(nbytes, nbytes),) * len(shares)]


def _scatter(shares: Sequence[Share], buffer_type: FloatType) -> list[Round]:
    parts = [_message(vector_bytes(len(share.sums), buffer_type)) for share in shares]
    whole, others = sum(parts), len(parts) - 1
    scatter = tuple(Traffic(whole - part, others * part) for part in parts)
    return [scatter, tuple(Traffic(received, sent) for sent, received in scatter)]


def _finish(shares: Sequence[Share], top_k: int) -> Round:
    _, *workers = (_message(_candidates_bytes(len(share.vocab), top_k)) for share in shares)
    return (Traffic(0, sum(workers)), *(Traffic(size, 0) for size in workers))


def _candidates_bytes(rows: int, top_k: int) -> int:
    everything = FloatType.F32.row_bytes(rows)
    return min(CANDIDATE_BYTES * top_k, everything) if top_k else everything


def _message(payload: int) -> int:
    """Bytes of a message, headers included; nothing to say needs none."""
    return payload + MESSAGE_BYTES if payload else 0
