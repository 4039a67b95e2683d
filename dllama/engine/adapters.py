"""The stages of adapters, compiled: each row of the batch adds its own sequence's scale·B·A·x to a product.

Both matrices stay apart from the model's (LoRA, unmerged: Hu et al., 2021, https://arxiv.org/abs/2106.09685), so that
the rows of a batch may have different adapters, or none. ``shrink`` leaves A·x, as many values as the adapter has
ranks, and ``expand`` adds B times these to what the product has left.

adapters: ``LOW_RANK`` records [adapters, layers, targets], targets in the order of `dllama.targets`. A step has an
array, by address:

    low    float32 [rows, targets of the product, largest rank], padded: A·x

low_stride and low_part: bytes from one row's values to the next's, and from one target's.
"""

import numpy as np

from dllama.engine.stages import row_parts, whole_blocks
from dllama.kernels import tags
from dllama.kernels.dot import multiply_rows
from dllama.kernels.elementwise import SUMMANDS, add_scaled, add_summands, add_summands_to_two, floats
from dllama.kernels.jit import jit
from dllama.kernels.packed import weight_bytes
from dllama.kernels.team import meet, take

QKV, OUT, UP, DOWN = map(np.int64, range(4))
"""The products of a layer, typed as `stages.ZERO` is."""
N_TARGETS = (3, 1, 2, 1)
"""Of each product, in the order of TARGETS."""
MOST_TARGETS = max(N_TARGETS)
FIRST = np.cumsum((0, *N_TARGETS))
"""The number of each product's first target, and how many there are."""
NO_ADAPTER = -1
"""What a row has that adds nothing."""

F32 = tags.F32


@jit
def adapt(thread, base, s, adapters, rows, layer, product, source, source_stride, out, out_stride):
    """out += scale·B·A·source for the targets of a product, whose outputs lie side by side, each padded to 32. Without
    adapters it is compiled to nothing, and skipped where no row has one."""
    if adapters is None:
        return base
    if not s.adapted:
        return base
    base = shrink(thread, base, F32, s, adapters, rows, layer, product, source, source_stride)
    return expand(thread, base, F32, s, adapters, rows, layer, product, out, out_stride)


@jit(inline=True)
def _rows_with(s, adapters, rows, row):
    """How many rows are worked with this one, which share its adapter's matrices: 1 or 2; 0 for one without an adapter,
    or that is worked with the row before it."""
    adapter = rows[row].adapter
    if adapter < 0 or (row % 2 == 1 and rows[row - 1].adapter == adapter):
        return 0
    return 1 + (row % 2 == 0 and row + 1 < s.rows and rows[row + 1].adapter == adapter)


@jit
def shrink(thread, base, form, s, adapters, rows, layer, product, source, source_stride):
    """low = A·source. An item is a row, or a part of the ranks of each target; two rows are worked as one as in
    ``expand``."""
    first, count = FIRST[product], FIRST[product + 1] - FIRST[product]
    parts = row_parts(s, s.rows, s.low_part // 4)
    item = take(s.sync, base)
    while item < s.rows * parts:
        row, part = item // parts, item % parts
        together = _rows_with(s, adapters, rows, row)
        if together:
            for i in range(count):
                target = adapters[rows[row].adapter, layer, first + i]
                stride = weight_bytes(form) * target.inputs
                start, end = target.a_rank * part // parts, target.a_rank * (part + 1) // parts
                multiply_rows(
                    form, target.a + stride * start, stride, end - start, target.inputs,
                    source + row * source_stride, source_stride, together,
                    s.low + row * s.low_stride + i * s.low_part + 4 * start, s.low_stride,
                )  # fmt: skip
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + s.rows * parts + s.threads


@jit
def expand(thread, base, form, s, adapters, rows, layer, product, out, out_stride):
    """out += B·low. An item is a row, or a part of the outputs of each target; two neighbours with the same adapter are
    worked as one, and the other's item is empty."""
    first, count = FIRST[product], FIRST[product + 1] - FIRST[product]
    parts = row_parts(s, s.rows, whole_blocks(s.dim) // 32)
    item = take(s.sync, base)
    while item < s.rows * parts:
        row, part = item // parts, item % parts
        together = _rows_with(s, adapters, rows, row)
        if together:
            to = out + row * out_stride
            for i in range(count):
                target = adapters[rows[row].adapter, layer, first + i]
                blocks = whole_blocks(target.outputs) // 32
                start, end = blocks * part // parts, blocks * (part + 1) // parts
                b, b_stride = target.b + 32 * weight_bytes(form) * start, 32 * weight_bytes(form) * blocks
                low = s.low + row * s.low_stride + i * s.low_part
                _add_ranks(
                    form, to + 128 * start, out_stride, together, b, b_stride, low, s.low_stride, target.b_rank,
                    32 * (end - start),
                )  # fmt: skip
                to += 128 * blocks
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + s.rows * parts + s.threads


@jit
def _add_ranks(form, x, x_stride, rows, b, b_stride, low, low_stride, ranks, n):
    """x[r] += Σ_j low[r, j]·b[j] for one row or two."""
    whole = ranks // SUMMANDS * SUMMANDS
    for j in range(0, whole, SUMMANDS):
        if rows == 1:
            add_summands(form, x, x_stride, b + j * b_stride, b_stride, low + 4 * j, low_stride, n)
        else:
            add_summands_to_two(form, x, x_stride, b + j * b_stride, b_stride, low + 4 * j, low_stride, n)
    for r in range(rows):
        factors = floats(low + r * low_stride, ranks)
        for j in range(whole, ranks):
            add_scaled(form, x + r * x_stride, b + j * b_stride, factors[j], n)
