"""Shares in proportion to weights, smaller where a node's memory does not hold its own."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from dllama.cluster.deal import deal, deal_heads, head_unit, spans
from dllama.cluster.node import NodeSpec
from dllama.cluster.share import Share
from dllama.engine.memory import in_units
from dllama.errors import PlanError
from dllama.formats import FloatType, ModelConfig
from dllama.formats.blocks import BLOCK


class NoShare(Exception):
    """A worker that gets no head: the others have to do."""

    def __init__(self, node: NodeSpec, reason: str):
        self.node, self.reason = node, reason


def fit(
    config: ModelConfig, weights: Mapping[NodeSpec, float], context: int, kv_type: FloatType, fixed: bool
) -> tuple[Share, ...]:
    """Deal a model out over exactly these nodes, the root first.

    fixed: keep to the weights; else a node gets less where its memory does not hold its share, and the others more

    Raises NoShare for a worker whose share comes to nothing, PlanError where the nodes' memory does not hold the model
    and where the model has fewer heads than there are nodes.
    """
    wanted = _shares(config, list(weights), list(weights.values()))
    shares = wanted
    if not fixed and _missing(wanted, context, kv_type):
        shares = _within_memory(wanted, list(weights.values()), context, kv_type) or wanted
    missing = _missing(shares, context, kv_type)
    if missing:
        raise PlanError(_message(shares, missing, context, kv_type))
    for share in shares:
        if not share.heads:
            raise NoShare(share.node, f"its share comes to less than {_least(config)}")
    return shares


def _shares(config: ModelConfig, nodes: Sequence[NodeSpec], weights: Sequence[float]) -> tuple[Share, ...]:
    heads = deal_heads(config, weights)
    blocks = spans(deal(-(-config.ffn_dim // BLOCK), weights))
    vocab = spans(deal(config.vocab_size, weights))
    sums = spans(deal(-(-config.dim // BLOCK), [1.0] * len(nodes)))
    return tuple(
        Share(config, node, i == 0, *ranges)
        for i, (node, *ranges) in enumerate(zip(nodes, heads, blocks, vocab, sums, strict=True))
    )


def _missing(shares: Sequence[Share], context: int, kv_type: FloatType) -> dict[Share, int]:
    """Bytes that nodes lack for their shares."""
    lack = {share: -_room(share, context, kv_type) for share in shares}
    return {share: nbytes for share, nbytes in lack.items() if nbytes > 0}


def _room(share: Share, context: int, kv_type: FloatType) -> float:
    """Bytes that a node has left beside its share."""
    return math.inf if share.node.memory is None else share.node.memory - share.memory_bytes(context, kv_type)


def _within_memory(
    wanted: Sequence[Share], weights: Sequence[float], context: int, kv_type: FloatType
) -> tuple[Share, ...] | None:
    """Shares for the same nodes that their memory holds; None where there are none. Raises NoShare.

    Heads are dealt first, FFN blocks and rows of the vocabulary, which are smaller, into the memory that they leave.
    """
    config = wanted[0].config
    everything = _ranges(config.n_heads, -(-config.ffn_dim // BLOCK), config.vocab_size)
    shares = [replace(share, **_ranges(0, 0, 0)) for share in wanted]

    def size(**units: range) -> int:
        return replace(shares[0], **units).memory_bytes(context, kv_type) - shares[0].memory_bytes(context, kv_type)

    weights = _held_back(weights, [_room(share, context, kv_type) / size(**everything) for share in shares])
    for name, units in everything.items():
        nbytes = size(**{name: units}) / len(units)
        most = [_room(share, context, kv_type) / nbytes for share in shares]
        try:
            if name == "heads":
                ranges = deal_heads(config, weights, most)
                _check_room_for_heads(shares, most)
            else:
                ranges = spans(deal(len(units), weights, most=most))
        except ValueError:
            return None
        shares = [replace(share, **{name: part}) for share, part in zip(shares, ranges, strict=True)]
    return tuple(shares)


def _check_room_for_heads(shares: Sequence[Share], most: Sequence[float]) -> None:
    for share, limit in zip(shares, most, strict=True):
        if limit < head_unit(share.config) and not share.is_root:
            raise NoShare(share.node, f"its {in_units(share.node.memory)} of memory hold no share of the model")


def _ranges(heads: int, ffn_blocks: int, vocab: int) -> dict[str, range]:
    return {"heads": range(heads), "ffn_blocks": range(ffn_blocks), "vocab": range(vocab)}


def _held_back(weights: Sequence[float], caps: Sequence[float]) -> list[float]:
    """Fractions in proportion to weights, but none above its cap; the others make up for it."""
    fractions, free, left = [0.0] * len(weights), list(range(len(weights))), 1.0
    while free:
        share = left / math.fsum(weights[node] for node in free)
        over = [node for node in free if weights[node] * share > caps[node]]
        if not over:
            break
        for node in over:
            fractions[node] = max(caps[node], 1e-9)
        left = max(1e-9, 1 - math.fsum(fractions))
        free = [node for node in free if node not in over]
    for node in free:
        fractions[node] = weights[node] * share
    return fractions


def _least(config: ModelConfig) -> str:
    unit = head_unit(config)
    return "a head" if unit == 1 else f"{unit} heads"


def _message(shares: Sequence[Share], missing: Mapping[Share, int], context: int, kv_type: FloatType) -> str:
    worst = max(missing, key=missing.__getitem__)
    node, need = worst.node, worst.memory_bytes(context, kv_type)
    total = -sum(_room(share, context, kv_type) for share in shares)
    together = f" (all nodes together: {in_units(total)})" if len(shares) > 1 and total > 0 else ""
    return (
        f"not enough memory for a context of {context} tokens: node {node.name} needs {in_units(need)} ({need} bytes) "
        f"and has {in_units(node.memory)} ({node.memory} bytes), {in_units(missing[worst])} are missing{together}; "
        "a shorter context or a KV cache in q80 takes less, and so does each of more nodes"
    )
