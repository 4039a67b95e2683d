"""The forward pass in halves, compiled: for a stack whose adapters' middle matrix, M, is somewhere else (PrivateLoRA).

Each of the four products of a layer has two halves. The first makes the product's input x out of what the product
before it left, and A·x with it. The second is the product itself: while it runs, A·x is on its way to whoever has M.
What comes back, M·A·x, is in ``low`` before the next first half begins, which adds B·M·A·x to the product.

Half 8·l + 2·p is the first of product p in layer l, 8·l + 2·p + 1 the second; products count from 0 in the order QKV,
OUT, UP, DOWN. LEAVE + l ends a pass in front of layer l: x is the residual stream then. A mixture of experts is worked
as a whole in its UP; its DOWN is empty, and its rows have no adapter there.

The step's ``half`` is the one that comes next, which the leading thread notes before each gate.
"""

from dllama.engine.adapters import DOWN, OUT, QKV, UP, expand, shrink
from dllama.engine.experts import choose, combine, gather, group, product_down, product_up, score
from dllama.engine.stages import YES, ZERO, activate, attend_rows, convert, norm, product, rotate
from dllama.kernels.elementwise import add
from dllama.kernels.jit import jit
from dllama.kernels.talk import talk_at
from dllama.kernels.team import gate, meet, take

LEAVE = 1 << 29


@jit
def run_halves(thread, weight, act, cache, step, layers, mixture, adapters, form, talk, rows, first, last):
    """Halves ``first`` up to ``last``; arguments as of `run_segments`, and ``form``: F32 or F16, what
    adapters are kept in;  ``talk``: the arguments of `talk_at`, or None. Helpers run whatever the leading thread does.
    """
    s = step[0]
    for half in range(first, last):
        if thread == 0:
            step[0]["half"] = half
        if gate(thread, s.sync, s.threads):
            return
        half = s.half
        if half >= LEAVE:
            base = _down_back(thread, ZERO, form, s, adapters, rows, half - LEAVE)
            _leave(base, s)
            continue
        index, part = half // 8, half % 8
        layer = layers[index]
        if part == 2 * QKV:
            base = _down_back(thread, ZERO, form, s, adapters, rows, index)
            _qkv_input(thread, base, weight, act, form, s, layer, adapters, rows, index)
        elif part == 2 * QKV + 1:
            _qkv(thread, weight, act, s, layer)
        elif part == 2 * OUT:
            _attend(thread, weight, act, cache, form, s, layer, adapters, rows, index)
        elif part == 2 * OUT + 1:
            _out(thread, weight, act, s, layer)
        elif part == 2 * UP:
            _up_input(thread, weight, act, form, s, layer, adapters, rows, index)
        elif mixture is not None:
            if part == 2 * UP + 1:
                _mixture(thread, weight, act, s, layer, mixture[index])
            else:
                meet(s.sync, s.threads)  # nobody is still about to read ``half`` when the next one is noted
        elif part == 2 * UP + 1:
            _up(thread, weight, act, s, layer)
        elif part == 2 * DOWN:
            _down_input(thread, weight, act, form, s, adapters, rows, index)
        else:
            _down(thread, weight, act, s, layer)
        if talk is not None and thread == 0:
            if talk_at(half, talk):
                return


@jit
def _down_back(thread, base, form, s, adapters, rows, index):
    """What the layer before this one waits for."""
    if index == 0:
        return base
    return expand(thread, base, form, s, adapters, rows, index - 1, DOWN, s.y, s.x_stride)


@jit(inline=True)
def _leave(base, s):
    item = take(s.sync, base)
    while item < s.rows:
        add(s.x + item * s.x_stride, s.y + item * s.x_stride, s.dim)
        item = take(s.sync, base)
    meet(s.sync, s.threads)


@jit(inline=True)
def _qkv_input(thread, base, weight, act, form, s, layer, adapters, rows, index):
    base = norm(thread, base, weight, act, s, layer.attention_norm, YES)
    shrink(thread, base, form, s, adapters, rows, index, QKV, s.norm_out, s.x_stride)


@jit(inline=True)
def _qkv(thread, weight, act, s, layer):
    query_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
    product(
        thread, ZERO, weight, act, s, s.dim, s.dim_bytes, s.dim_acts, s.dim_stride, s.rows,
        layer.q, query_width, layer.k, kv_width, layer.v, kv_width, s.qkv, s.qkv_stride,
    )  # fmt: skip


@jit(inline=True)
def _attend(thread, weight, act, cache, form, s, layer, adapters, rows, index):
    query_width = s.heads * s.head_dim
    base = expand(thread, ZERO, form, s, adapters, rows, index, QKV, s.qkv, s.qkv_stride)
    base = rotate(thread, base, cache, s, layer, rows, index)
    base = attend_rows(thread, base, cache, s, rows, index)
    base = convert(thread, base, weight, act, s, s.attention, s.attention_stride, query_width, s.q_acts, s.q_stride)
    shrink(thread, base, form, s, adapters, rows, index, OUT, s.attention, s.attention_stride)


@jit(inline=True)
def _out(thread, weight, act, s, layer):
    product(
        thread, ZERO, weight, act, s, s.heads * s.head_dim, s.q_bytes, s.q_acts, s.q_stride, s.rows,
        layer.o, s.dim, layer.o, ZERO, layer.o, ZERO, s.y, s.x_stride,
    )  # fmt: skip


@jit(inline=True)
def _up_input(thread, weight, act, form, s, layer, adapters, rows, index):
    base = expand(thread, ZERO, form, s, adapters, rows, index, OUT, s.y, s.x_stride)
    base = norm(thread, base, weight, act, s, layer.ffn_norm, YES)
    shrink(thread, base, form, s, adapters, rows, index, UP, s.norm_out, s.x_stride)


@jit(inline=True)
def _up(thread, weight, act, s, layer):
    product(
        thread, ZERO, weight, act, s, s.dim, s.dim_bytes, s.dim_acts, s.dim_stride, s.rows,
        layer.w1, s.hidden_dim, layer.w3, s.hidden_dim, layer.w1, ZERO, s.hidden, s.hidden_row_stride,
    )  # fmt: skip


@jit(inline=True)
def _mixture(thread, weight, act, s, layer, experts):
    base = score(thread, ZERO, s, layer.router)
    base = choose(thread, base, s)
    group(thread, s)
    base = gather(thread, base, s)
    base = product_up(thread, base, weight, act, s, experts)
    base = activate(thread, base, weight, act, s, s.places)
    base = product_down(thread, base, weight, act, s, experts)
    combine(thread, base, s)


@jit(inline=True)
def _down_input(thread, weight, act, form, s, adapters, rows, index):
    base = expand(thread, ZERO, form, s, adapters, rows, index, UP, s.hidden, s.hidden_row_stride)
    base = activate(thread, base, weight, act, s, s.rows)
    shrink(thread, base, form, s, adapters, rows, index, DOWN, s.hidden, s.hidden_row_stride)


@jit(inline=True)
def _down(thread, weight, act, s, layer):
    product(
        thread, ZERO, weight, act, s, s.hidden_dim, s.hidden_bytes, s.hidden_acts, s.hidden_stride, s.rows,
        layer.w2, s.dim, layer.w2, ZERO, layer.w2, ZERO, s.y, s.x_stride,
    )  # fmt: skip
