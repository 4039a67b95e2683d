"""The stages of adapters, compiled: each row of the batch adds its own sequence's scale·B·A·x to a product.

Both matrices stay apart from the model's (LoRA, unmerged: Hu et al., 2021, https://arxiv.org/abs/2106.09685), so that
the rows of a batch may have different adapters, or none. ``shrink`` leaves A·x, as many values as the adapter has
ranks, and ``expand`` adds B times these to what the product has left.

adapters: ``LOW_RANK`` records [adapters, layers, targets], targets in the order of `dllama.targets`. A step has an
array, by address:

    low    float32 [rows, targets of the product, largest rank], padded: A·x

low_stride and low_part: bytes from one row's values to the next's, and from one target's.
"""

from dllama.engine.stages import row_parts, whole_blocks
from dllama.kernels import tags
from dllama.kernels.dot import multiply_rows
from dllama.kernels.elementwise import add_scaled, floats
from dllama.kernels.jit import jit
from dllama.kernels.packed import weight_bytes
from dllama.kernels.team import meet, take

QKV, ATTENTION_OUT, GATE_UP, DOWN = 0, 3, 4, 6
"""The number of each product's first target, in the order of TARGETS."""
MOST_TARGETS = 3
"""Of one product."""
NO_ADAPTER = -1
"""What a row has that adds nothing."""

F32 = tags.F32


@jit
def adapt(thread, base, s, adapters, rows, layer, first, count, source, source_stride, out, out_stride):
    """out += scale·B·A·source for the ``count`` targets from ``first`` on, whose outputs lie side by side, each padded
    to 32. Without adapters it is compiled to nothing, and skipped where no row has one."""
    if adapters is None:
        return base
    if not s.adapted:
        return base
    base = shrink(thread, base, F32, s, adapters, rows, layer, first, count, source, source_stride)
    return expand(thread, base, F32, s, adapters, rows, layer, first, count, out, out_stride)


@jit
def shrink(thread, base, form, s, adapters, rows, layer, first, count, source, source_stride):
    """low = A·source. An item is a row, or a part of the ranks of each target."""
    parts = row_parts(s, s.rows, s.low_part // 4)
    item = take(s.sync, base)
    while item < s.rows * parts:
        row, part = item // parts, item % parts
        adapter = rows[row].adapter
        if adapter >= 0:
            for i in range(count):
                target = adapters[adapter, layer, first + i]
                stride = weight_bytes(form) * target.inputs
                start, end = target.a_rank * part // parts, target.a_rank * (part + 1) // parts
                multiply_rows(
                    form, target.a + stride * start, stride, end - start, target.inputs,
                    source + row * source_stride, 0, 1, s.low + row * s.low_stride + i * s.low_part + 4 * start, 0,
                )  # fmt: skip
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + s.rows * parts + s.threads


@jit
def expand(thread, base, form, s, adapters, rows, layer, first, count, out, out_stride):
    """out += B·low. An item is a row, or a part of the outputs of each target."""
    parts = row_parts(s, s.rows, whole_blocks(s.dim) // 32)
    item = take(s.sync, base)
    while item < s.rows * parts:
        row, part = item // parts, item % parts
        adapter = rows[row].adapter
        if adapter >= 0:
            to = out + row * out_stride
            for i in range(count):
                target = adapters[adapter, layer, first + i]
                low = floats(s.low + row * s.low_stride + i * s.low_part, target.b_rank)
                blocks = whole_blocks(target.outputs) // 32
                start, end = blocks * part // parts, blocks * (part + 1) // parts
                for j in range(target.b_rank):
                    b = target.b + 32 * weight_bytes(form) * (j * blocks + start)
                    add_scaled(form, to + 128 * start, b, low[j], 32 * (end - start))
                to += 128 * blocks
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    return base + s.rows * parts + s.threads
