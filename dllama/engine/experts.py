"""The stages of a mixture of experts, compiled: of each layer's experts, a few work on a row.

A row's router logits choose its experts, those with the highest, and the softmax of these alone says how their outputs
are mixed. Each pair of a row and one of its experts gets a **place**: a row of the experts' inputs, of their hidden
values and of their outputs. An expert's places follow one another, so that its weights are read once for all rows that
chose it; of experts that no row chose nothing is read.

Arrays of a step, by address, for rows of ``active`` pairs each:

    router_logits  float32 [rows, experts], rows padded
    chosen         int64 [rows, active]: experts, the likeliest first, and once they are grouped the pairs' places
    mix            float32 [rows, active], rows padded: what the outputs are multiplied with, in each row 1 together
    counts         int64 [experts]: rows that chose each, then the next of its places
    groups         ``GROUP`` records, n_groups of them: the experts that were chosen at all
    expert_acts    inputs of the first products at each place, ``dim_stride`` bytes apart
    expert_out     float32 [places, dim], rows padded

n_groups and places, the number of places with the gaps between groups, are set by ``group``.
"""

import numpy as np

from dllama.engine.stages import ITEM_BYTES, TILE, multiply, row_parts, rows_of_item, whole_blocks
from dllama.kernels import tags
from dllama.kernels.elementwise import add_scaled, copy, floats, integers, scale, softmax
from dllama.kernels.jit import jit
from dllama.kernels.router import multiply_router
from dllama.kernels.team import meet, take

GROUP = 3
"""int64 of a group: an expert, its first place, how many it has."""


def most_places(rows: int, experts: int, active: int) -> int:
    """Places that so many rows can take: their pairs, and gaps after the groups."""
    pairs = rows * active
    return pairs + min(pairs, experts) * (TILE - 1)


@jit
def score(thread, base, s, router):
    """router_logits = router·norm_out. An item is a few experts, for all rows."""
    chunk = max(min(ITEM_BYTES // (4 * s.dim * s.rows), s.experts // (s.threads * 4)), 1)
    items = -(-s.experts // chunk)
    item = take(s.sync, base)
    while item < items:
        first = item * chunk
        multiply_router(
            router + 4 * s.dim * first, min(chunk, s.experts - first), s.dim, s.norm_out, s.x_stride, s.rows,
            s.router_logits + 4 * first, s.router_stride,
        )  # fmt: skip
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + items + s.threads


@jit
def choose(thread, base, s):
    """Each row's experts and their mix; of equal logits the first expert's counts as higher. An item is a row."""
    item = take(s.sync, base)
    while item < s.rows:
        logits = floats(s.router_logits + item * s.router_stride, s.experts)
        chosen = integers(s.chosen + 8 * item * s.active, s.active)
        address = s.mix + item * s.mix_stride
        mix = floats(address, s.active)
        for expert in range(s.experts):  # sorted in among those before it; the first ones, be they NaN, always are
            slot, logit = min(expert, s.active), logits[expert]
            if slot == s.active:
                slot -= 1
                if not logit > mix[slot]:
                    continue
            while slot > 0 and logit > mix[slot - 1]:
                chosen[slot], mix[slot] = chosen[slot - 1], mix[slot - 1]
                slot -= 1
            chosen[slot], mix[slot] = expert, logit
        inverse = np.float32(1) / softmax(address, s.active)
        for slot in range(s.active):
            mix[slot] *= inverse
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + s.rows + s.threads


@jit
def group(thread, s):
    """Gives each pair its place; one thread's work."""
    if thread == 0:
        chosen, counts = integers(s.chosen, s.rows * s.active), integers(s.counts, s.experts)
        groups = integers(s.groups, GROUP * s.experts)
        counts[:] = 0
        for pair in range(len(chosen)):
            counts[chosen[pair]] += 1
        n_groups = places = 0
        for expert in range(s.experts):
            count = counts[expert]
            if count > 0:
                entry = GROUP * n_groups
                groups[entry], groups[entry + 1], groups[entry + 2] = expert, places, count
                n_groups += 1
                counts[expert] = places
                places += 1 if count == 1 else (count + TILE - 1) // TILE * TILE
        for pair in range(len(chosen)):
            expert = chosen[pair]
            chosen[pair] = counts[expert]
            counts[expert] += 1
        s.n_groups, s.places = n_groups, places
    meet(s.sync, s.threads)


@jit
def gather(thread, base, s):
    """Each row's input at the places of its pairs. An item is a pair."""
    chosen = integers(s.chosen, s.rows * s.active)
    item = take(s.sync, base)
    while item < len(chosen):
        row = item // s.active
        copy(s.expert_acts + chosen[item] * s.dim_stride, s.dim_acts + row * s.dim_stride, s.dim_stride)
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + len(chosen) + s.threads


@jit
def product_up(thread, base, weight, act, s, experts):
    """hidden = w1·x, then w3·x, at the places of each group. An item is some rows of one matrix of one expert."""
    groups = integers(s.groups, GROUP * s.n_groups)
    chunk = rows_of_item(s, s.dim_bytes, _rows_of_group(s), 2 * s.hidden_dim * s.n_groups)
    of_matrix = -(-s.hidden_dim // chunk)
    items = 2 * of_matrix * s.n_groups
    item = take(s.sync, base)
    while item < items:
        g, part = item // (2 * of_matrix), item % (2 * of_matrix)
        expert, place, tokens = groups[GROUP * g], groups[GROUP * g + 1], groups[GROUP * g + 2]
        w, offset = experts[expert].w1, 0
        if part >= of_matrix:
            w, offset, part = experts[expert].w3, whole_blocks(s.hidden_dim), part - of_matrix
        first = part * chunk
        multiply(
            weight, act, w + first * s.dim_bytes, s.dim_bytes, min(chunk, s.hidden_dim - first), s.dim,
            s.expert_acts + place * s.dim_stride, s.dim_stride, tokens,
            s.hidden + place * s.hidden_row_stride + 4 * (offset + first), s.hidden_row_stride,
        )  # fmt: skip
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + items + s.threads


@jit
def product_down(thread, base, weight, act, s, experts):
    """expert_out = w2·hidden at the places of each group. An item is some rows of one expert."""
    groups = integers(s.groups, GROUP * s.n_groups)
    chunk = rows_of_item(s, s.hidden_bytes, _rows_of_group(s), s.dim * s.n_groups)
    of_matrix = -(-s.dim // chunk)
    items = of_matrix * s.n_groups
    item = take(s.sync, base)
    while item < items:
        g, first = item // of_matrix, item % of_matrix * chunk
        expert, place, tokens = groups[GROUP * g], groups[GROUP * g + 1], groups[GROUP * g + 2]
        multiply(
            weight, act, experts[expert].w2 + first * s.hidden_bytes, s.hidden_bytes, min(chunk, s.dim - first),
            s.hidden_dim, s.hidden_acts + place * s.hidden_stride, s.hidden_stride, tokens,
            s.expert_out + place * s.x_stride + 4 * first, s.x_stride,
        )  # fmt: skip
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + items + s.threads


@jit(inline=True)
def _rows_of_group(s):
    """Rows of the mean group."""
    return max(s.rows * s.active // s.n_groups, 1)


@jit
def combine(thread, base, s):
    """y = the sum of a row's expert_out, each times its mix. An item is a row, or a part of it."""
    blocks = whole_blocks(s.dim) // 32
    parts = row_parts(s, s.rows, blocks)
    item = take(s.sync, base)
    while item < s.rows * parts:
        row, part = item // parts, item % parts
        first, last = blocks * part // parts, blocks * (part + 1) // parts
        y, width = s.y + row * s.x_stride + 128 * first, 32 * (last - first)
        places = integers(s.chosen + 8 * row * s.active, s.active)
        mix = floats(s.mix + row * s.mix_stride, s.active)
        for slot in range(s.active):
            out = s.expert_out + places[slot] * s.x_stride + 128 * first
            if slot == 0:
                scale(y, out, mix[slot], width)
            else:
                add_scaled(tags.F32, y, out, mix[slot], width)
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + s.rows * parts + s.threads
