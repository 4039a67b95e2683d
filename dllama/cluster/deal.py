"""Whole heads, blocks and rows, dealt out in proportion to weights.

Between two exchanges every node waits for the slowest, so that each kind of unit is dealt by itself: more FFN blocks
would not make up for fewer heads.
"""

import heapq
import math
from collections.abc import Sequence
from itertools import accumulate, pairwise

from dllama.errors import PlanError
from dllama.formats import ModelConfig
from dllama.formats.blocks import BLOCK


def deal(units: int, weights: Sequence[float], first: int = 0, most: Sequence[float] | None = None) -> list[int]:
    """How many of ``units`` go to each weight, so that the largest count/weight is as small as possible.

    This is D'Hondt's method: one unit after another goes to whoever has the least count/weight with it, the first of
    them where they are equal. Nobody gets less than its exact share rounded down.

    first: what the first gets at least;  most: what each gets at most, and where that is less than its share the others
    get more. Raises ValueError where that is too little for all units.
    """
    most = [math.inf] * len(weights) if most is None else most
    total = math.fsum(weights)
    counts = [math.floor(units * (weight / total)) - 1 for weight in weights]  # so many all surely get
    counts = [max(0, min(count, int(min(units, limit)))) for count, limit in zip(counts, most, strict=True)]
    counts[0] = max(counts[0], first)
    queue = [
        ((counts[node] + 1) / weights[node], node) for node in range(len(weights)) if counts[node] + 1 <= most[node]
    ]
    heapq.heapify(queue)
    for _ in range(units - sum(counts)):
        if not queue:
            raise ValueError(f"{units} units are more than all may get")
        _, node = heapq.heappop(queue)
        counts[node] += 1
        if counts[node] + 1 <= most[node]:
            heapq.heappush(queue, ((counts[node] + 1) / weights[node], node))
    return counts


def spans(counts: Sequence[int], unit: int = 1) -> list[range]:
    """Neighbouring ranges of ``counts`` units each, the first from 0 on."""
    return [range(unit * start, unit * end) for start, end in pairwise(accumulate(counts, initial=0))]


def head_unit(config: ModelConfig) -> int:
    """The least number of heads that a node can hold more or less of.

    A node's heads are columns of ``o``, and a row of quantised weights can be cut between blocks of 32 columns only:
    heads of 16 values go in twos, heads of 24 in fours, heads of 20 or 36 in eights. n_heads is always a multiple.
    """
    if not config.weight_type.is_quantized:
        return 1
    return math.lcm(config.head_dim, BLOCK) // config.head_dim


def kv_heads_of(config: ModelConfig, heads: range) -> range:
    """The kv heads that these neighbouring query heads read: query head h reads kv head h // group."""
    group = config.n_heads // config.n_kv_heads
    return range(heads.start // group, -(-heads.stop // group)) if heads else range(0)


def deal_heads(config: ModelConfig, weights: Sequence[float], most: Sequence[float] | None = None) -> list[range]:
    """The query heads of each node, neighbours; empty for a weight too small for any, but for the first.

    A kv head is held, worked and cached by every node that has one of its query heads. Nodes get whole groups where
    that is no slower than cutting through them, else the largest part of a group that is fastest.
    Raises PlanError where the model has too few heads for so many nodes, ValueError where ``most``, the heads that each
    may get, are too few.
    """
    most = [math.inf] * len(weights) if most is None else most
    least = head_unit(config)
    if config.n_heads // least < len(weights):
        raise PlanError(_too_many(config, least, len(weights)))
    group = config.n_heads // config.n_kv_heads
    best, shortest = [], math.inf
    for unit in sorted({math.lcm(least, part) for part in range(1, group + 1) if group % part == 0}, reverse=True):
        try:
            counts = deal(config.n_heads // unit, weights, first=1, most=[limit / unit for limit in most])
        except ValueError:
            if unit > least:
                continue
            raise
        if unit > least and not all(counts):
            continue  # perhaps all get some where the units are smaller
        heads = spans(counts, unit)
        longest = max(_work(config, part) / weight for part, weight in zip(heads, weights, strict=True))
        if longest < shortest:
            best, shortest = heads, longest
    return best


def _work(config: ModelConfig, heads: range) -> int:
    """Weights to read for these heads. A query head's rows of q and columns of o are as many as a kv head's of k, v."""
    return len(heads) + len(kv_heads_of(config, heads))


def _too_many(config: ModelConfig, least: int, nodes: int) -> str:
    if least == 1:
        return f"{nodes} nodes, and each needs a head of its own: the model has {config.n_heads}"
    return (
        f"{nodes} nodes, and the model can be dealt to {config.n_heads // least} at most: its {config.n_heads} heads "
        f"of {config.head_dim} values go in units of {least}, as {config.weight_type.name} weights are cut "
        f"between blocks of {BLOCK} columns only"
    )
