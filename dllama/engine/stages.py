"""The stages of the forward pass, compiled: what every thread of a team runs between two barriers.

A stage shares its items out by tickets and has a barrier at its end. All sizes and addresses come in one record, so
that a call costs little: see ``STEP``, ``LAYER`` and ``ROW``. `segments` says which stages make a segment, `experts`
has those of a mixture of experts, `adapters` those of adapters.
"""

import math

import numpy as np

from dllama.kernels import dot, packed, router
from dllama.kernels.attention import HEADS, attend
from dllama.kernels.dot import multiply_rows
from dllama.kernels.elementwise import add, copy, floats, gelu_times, rms_norm, silu_times, to_acts, to_cache
from dllama.kernels.jit import jit
from dllama.kernels.packed import ROWS, multiply_packed, uses_packed
from dllama.kernels.team import meet, take

ITEM_BYTES = 64 << 10
"""Weights that one ticket of a product stands for: long enough to stream, short enough to share out evenly."""

TILE = math.lcm(dot.TOKENS, packed.TOKENS, router.TOKENS)
"""Rows that products of more than one row work on at once: of inputs and outputs there is room for a multiple of it."""


ZERO, YES = np.int64(0), np.bool_(True)
"""A plain 0 or True has a type of its own to numba, and a stage that is given one is compiled once more for it."""


def _record(**fields):
    return np.dtype([(name, kind) for kind, names in fields.items() for name in names.split()])


STEP = _record(
    i8="""
    sync threads gated part_bytes
    rows logit_rows
    dim hidden_dim heads kv_heads group group_start head_dim vocab
    dim_bytes q_bytes hidden_bytes
    half_split gelu
    x y norm_out qkv queries attention hidden logits
    dim_acts q_acts hidden_acts dim_stride q_stride hidden_stride
    x_stride qkv_stride queries_stride attention_stride hidden_row_stride logits_stride
    cos sin rope_stride
    scratch scratch_stride heads_out scores scores_stride
    experts active router_logits router_stride chosen mix mix_stride counts groups
    expert_acts expert_out n_groups places
    adapted low low_stride low_part half
    final_norm output
    cache_row
    """,
    f4="epsilon",
)
"""Sizes, addresses and strides (bytes) of a step.

gated: whether threads stop at a gate before each segment; part_bytes: what a node's part takes to travel, where
compiled code is to exchange it after a segment, else 0.
rows: tokens in the batch; logit_rows: those whose logits are wanted; heads, kv_heads, hidden_dim, vocab: this node's.
group: query heads of a kv head; group_start: those of this node's first kv head that nodes before it have.
dim_bytes, q_bytes, hidden_bytes: from one row of weights to the next, for inputs of the width of the residual stream,
of the node's queries and of its hidden values.
x: residual stream; y: this node's part of a segment's output, and after the exchange the sum of all;
qkv: queries, keys and values as the products leave them, each part padded to 32 values; queries: after rope, each
head padded; hidden: gate, then up, each padded; *_acts: inputs of the products; cos, sin: [rows, head_dim / 2].
scratch: each thread's own memory: a padded head; at the offset ``heads_out`` HEADS of them; at ``scores`` what
``attend`` asks for.
cache_row: bytes of a head's key or value at one position.
experts, active: of a mixture, in each layer and for each row; hidden_dim then is an expert's, and hidden and its acts
have a row for each place; the rest of that line and of the next is told in `experts`.
adapted: whether any row has an adapter; the rest of that line is told in `adapters`, and ``half`` in `halves`.
"""

LAYER = _record(i8="q k v o w1 w2 w3 router q_norm k_norm attention_norm ffn_norm")
"""Addresses of a layer's tensors; norms are padded float32. 0 stands for what the model has not: q_norm and k_norm, a
router, or in a layer with one w1, w2 and w3."""

EXPERT = _record(i8="w1 w2 w3")
"""Addresses of an expert's matrices."""

LOW_RANK = _record(i8="a a_rank b b_rank inputs outputs")
"""What an adapter adds to a matrix of a layer. a: address of A, [a_rank, inputs]; b: of B transposed and times the
scale, [b_rank, outputs], rows padded; float32, or float16 where `halves` has them so. The ranks are 0 where it adds
nothing, and equal where nothing is between A and B."""

ROW = _record(i8="position keys values layer_stride head_stride wanted adapter")
"""One row of the batch: its position, the addresses of its sequence's caches and their strides in bytes. ``wanted``:
for the first logit_rows rows, the row of the batch whose logits go there; ``adapter``: its sequence's number, or
NO_ADAPTER of `adapters`."""


@jit(inline=True)
def whole_blocks(n):
    """n values and the zeros after them, up to a multiple of 32."""
    return (n + 31) // 32 * 32


@jit(inline=True)
def row_parts(s, rows, blocks):
    """Items that a row of so many blocks makes: one, but several where rows are few."""
    return 1 if rows >= 2 * s.threads or s.threads == 1 else min(2 * s.threads, blocks)


@jit
def norm(thread, base, weight, act, s, norm, pending):
    """x += y where a sum is pending; the norm of x as the input of the next product."""
    item = take(s.sync, base)
    while item < s.rows:
        x, out = s.x + item * s.x_stride, s.norm_out + item * s.x_stride
        if pending:
            add(x, s.y + item * s.x_stride, s.dim)
        rms_norm(x, norm, out, s.dim, s.epsilon)
        to_acts(weight, act, out, s.dim_acts + item * s.dim_stride, 0, whole_blocks(s.dim) // 32)
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + s.rows + s.threads


@jit
def convert(thread, base, weight, act, s, source, source_stride, width, acts, acts_stride):
    """Rows of floats as the input of the next product."""
    item = take(s.sync, base)
    while item < s.rows:
        to_acts(weight, act, source + item * source_stride, acts + item * acts_stride, 0, whole_blocks(width) // 32)
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + s.rows + s.threads


@jit
def activate(thread, base, weight, act, s, rows):
    """gate = act(gate)·up for some rows of hidden values, as the input of the next product."""
    blocks = whole_blocks(s.hidden_dim) // 32
    parts = row_parts(s, rows, blocks)
    item = take(s.sync, base)
    while item < rows * parts:
        row, part = item // parts, item % parts
        first, last = blocks * part // parts, blocks * (part + 1) // parts
        gate = s.hidden + row * s.hidden_row_stride
        up = gate + 128 * (blocks + first)
        if s.gelu:
            gelu_times(gate + 128 * first, up, 32 * (last - first))
        else:
            silu_times(gate + 128 * first, up, 32 * (last - first))
        to_acts(weight, act, gate, s.hidden_acts + row * s.hidden_stride, first, last)
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + rows * parts + s.threads


@jit
def product(
    thread, base, weight, act, s, columns, w_stride, acts, acts_stride, tokens,
    w0, rows0, w1, rows1, w2, rows2, out, out_stride,
):  # fmt: skip
    """out[t] = w0·x[t], w1·x[t], w2·x[t] side by side, each padded to 32, for up to three matrices of one width."""
    chunk = rows_of_item(s, w_stride, tokens, rows0 + rows1 + rows2)
    items0, items1, items2 = -(-rows0 // chunk), -(-rows1 // chunk), -(-rows2 // chunk)
    items = items0 + items1 + items2
    item = take(s.sync, base)
    while item < items:
        w, first, end, offset = w0, item * chunk, rows0, 0
        if item >= items0 + items1:
            w, first, end = w2, (item - items0 - items1) * chunk, rows2
            offset = whole_blocks(rows0) + whole_blocks(rows1)
        elif item >= items0:
            w, first, end, offset = w1, (item - items0) * chunk, rows1, whole_blocks(rows0)
        multiply(
            weight, act, w + first * w_stride, w_stride, min(chunk, end - first), columns, acts, acts_stride, tokens,
            out + 4 * (offset + first), out_stride,
        )  # fmt: skip
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + items + s.threads


@jit(inline=True)
def rows_of_item(s, w_stride, tokens, rows):
    """Rows of weights that one ticket of a product stands for, where there are so many in all."""
    chunk = max(ITEM_BYTES // max(w_stride * tokens, 1), 1)  # a node may have no hidden values, rows of 0 bytes
    chunk = min(chunk, rows // (s.threads * 8))
    return max((chunk + ROWS - 1) // ROWS, 1) * ROWS


@jit(inline=True)
def multiply(weight, act, w, w_stride, rows, columns, acts, acts_stride, tokens, out, out_stride):
    """out[t] = w·x[t] for some rows of a matrix, packed where it meets packed activations."""
    if uses_packed(weight, act):
        groups = (rows + ROWS - 1) // ROWS
        multiply_packed(weight, w, groups, columns, acts, acts_stride, tokens, out, out_stride)
    else:
        multiply_rows(weight, w, w_stride, rows, columns, acts, acts_stride, tokens, out, out_stride)


@jit(inline=True)
def _queries_of(s, kv_head):
    """This node's query heads that read its kv head of this number, first and end."""
    start = kv_head * s.group - s.group_start
    return max(start, 0), min(start + s.group, s.heads)


@jit
def rotate(thread, base, cache, s, layer, rows, index):
    """q and k norms, rotary embedding, and the new keys and values into the cache. An item is a kv head of a row."""
    padded = whole_blocks(s.head_dim)
    scratch = s.scratch + thread * s.scratch_stride
    key = floats(scratch, padded)  # zeros beyond the head, for nothing writes there
    item = take(s.sync, base)
    while item < s.rows * s.kv_heads:
        r, g = item // s.kv_heads, item % s.kv_heads
        row = rows[r]
        qkv = s.qkv + r * s.qkv_stride
        cos = floats(s.cos + r * s.rope_stride, s.head_dim // 2)
        sin = floats(s.sin + r * s.rope_stride, s.head_dim // 2)
        first, end = _queries_of(s, g)
        for h in range(first, end):
            query = floats(s.queries + r * s.queries_stride + h * 4 * padded, padded)
            _turn(floats(qkv + 4 * h * s.head_dim, s.head_dim), query, layer.q_norm, cos, sin, s)
        place = index * row.layer_stride + g * row.head_stride + row.position * s.cache_row
        source = qkv + 4 * (whole_blocks(s.heads * s.head_dim) + g * s.head_dim)
        _turn(floats(source, s.head_dim), key, layer.k_norm, cos, sin, s)
        to_cache(cache, scratch, row.keys + place, padded)
        copy(scratch, source + 4 * whole_blocks(s.kv_heads * s.head_dim), 4 * s.head_dim)
        to_cache(cache, scratch, row.values + place, padded)
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + s.rows * s.kv_heads + s.threads


@jit
def _turn(source, out, norm, cos, sin, s):
    """out = rope(norm(source)) for one head; pairs (2i, 2i+1), or (i, i + head_dim/2) where they are half-split."""
    half = len(source) // 2
    if norm != 0:
        scale = floats(norm, len(source))
        total = np.float32(0)
        for i in range(len(source)):
            total += source[i] * source[i]
        factor = np.float32(1) / np.sqrt(total / np.float32(len(source)) + s.epsilon)
        for i in range(len(source)):
            source[i] = source[i] * factor * scale[i]
    if s.half_split:
        for i in range(half):
            a, b = source[i], source[i + half]
            out[i] = a * cos[i] - b * sin[i]
            out[i + half] = a * sin[i] + b * cos[i]
    else:
        for i in range(half):
            a, b = source[2 * i], source[2 * i + 1]
            out[2 * i] = a * cos[i] - b * sin[i]
            out[2 * i + 1] = a * sin[i] + b * cos[i]


@jit
def attend_rows(thread, base, cache, s, rows, index):
    """Attention of each query over its own past. An item is a kv head of a row, the longest pasts first."""
    padded = whole_blocks(s.head_dim)
    scratch = s.scratch + thread * s.scratch_stride
    out = scratch + s.heads_out
    item = take(s.sync, base)
    while item < s.rows * s.kv_heads:
        r, g = s.rows - 1 - item // s.kv_heads, item % s.kv_heads
        row = rows[r]
        place = index * row.layer_stride + g * row.head_stride
        past = row.position + 1
        h, end = _queries_of(s, g)
        while h < end:
            heads = HEADS if end - h >= HEADS else 1
            attend(
                cache, s.queries + r * s.queries_stride + h * 4 * padded, 4 * padded, heads, row.keys + place,
                row.values + place, s.cache_row, past, s.head_dim, scratch + s.scores, s.scores_stride, out,
            )  # fmt: skip
            for i in range(heads):
                target = s.attention + r * s.attention_stride + 4 * (h + i) * s.head_dim
                copy(target, out + i * 4 * padded, 4 * s.head_dim)
            h += heads
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + s.rows * s.kv_heads + s.threads
