"""The forward pass, compiled: what every thread of a team runs between two exchanges.

A layer has two **segments**, and an exchange belongs after each: the attention segment turns the residual stream into
this node's part of the attention output, the FFN segment into its part of the FFN output; with several nodes the parts
are summed before the next segment adds them to the stream. Segment 2·l is the attention of layer l, 2·l + 1 its FFN,
2·n_layers the output rows. On one node a whole step is one call of every thread. With several nodes the helpers still
make one call, but stop at a gate before each segment until the leading thread comes there too. It exchanges the parts
in between, and stays in compiled code as long as those of the other nodes come as they should.

Within a segment `stages` follow one another. What is called from one place only is inlined: else it would be compiled
by itself, and again as a part of what calls it.
"""

from dllama.engine.adapters import DOWN, OUT, QKV, UP, adapt
from dllama.engine.experts import choose, combine, gather, group, product_down, product_up, score
from dllama.engine.stages import YES, ZERO, activate, attend_rows, convert, norm, product, rotate, whole_blocks
from dllama.kernels.elementwise import add, rms_norm, to_acts
from dllama.kernels.jit import jit
from dllama.kernels.team import gate, meet, take
from dllama.kernels.trade import trade


@jit
def run_segments(thread, weight, act, cache, step, layers, mixture, adapters, exchange, rows, first, last):
    """Segments ``first`` up to ``last``; every thread of the team calls it with its own number. Returns the first
    segment whose exchange has stopped before its end, ``last`` where none has.

    mixture: ``EXPERT`` records [layers, experts], or None; a model without experts is compiled without their stages
    adapters: ``LOW_RANK`` records [adapters, layers, targets], or None, and then likewise
    exchange: the first arguments of `trade`, or None, and then likewise
    """
    s = step[0]
    base = ZERO
    for segment in range(first, last):
        if s.gated:
            base = ZERO
            if gate(thread, s.sync, s.threads):
                return last
        if segment == 2 * len(layers):
            base = _output(thread, base, weight, act, s, rows)
        elif segment % 2 == 0:
            base = _attention(thread, base, weight, act, cache, s, layers[segment // 2], adapters, rows, segment)
        elif mixture is None:
            base = _feed_forward(thread, base, weight, act, s, layers[segment // 2], adapters, rows, segment)
        else:
            base = _mixture(thread, base, weight, act, s, layers[segment // 2], mixture[segment // 2])
        if exchange is not None and thread == 0 and s.part_bytes and segment < 2 * len(layers):
            if _exchange(s, exchange):
                return segment
    return last


@jit
def _exchange(s, exchange):
    """The parts of all nodes are summed; whether that has stopped before its end."""
    tag, api, nodes, items, sources, groups, states = exchange
    rounds = len(groups) - 1
    return trade(
        tag, api, nodes, items, sources, groups, states, 0, rounds, False, s.y, s.x_stride, s.rows, s.dim, s.part_bytes
    )


@jit(inline=True)
def _attention(thread, base, weight, act, cache, s, layer, adapters, rows, segment):
    query_width, kv_width = s.heads * s.head_dim, s.kv_heads * s.head_dim
    base = norm(thread, base, weight, act, s, layer.attention_norm, segment > 0)
    base = product(
        thread, base, weight, act, s, s.dim, s.dim_bytes, s.dim_acts, s.dim_stride, s.rows,
        layer.q, query_width, layer.k, kv_width, layer.v, kv_width, s.qkv, s.qkv_stride,
    )  # fmt: skip
    base = adapt(thread, base, s, adapters, rows, segment // 2, QKV, s.norm_out, s.x_stride, s.qkv, s.qkv_stride)
    base = rotate(thread, base, cache, s, layer, rows, segment // 2)
    base = attend_rows(thread, base, cache, s, rows, segment // 2)
    base = convert(thread, base, weight, act, s, s.attention, s.attention_stride, query_width, s.q_acts, s.q_stride)
    base = product(
        thread, base, weight, act, s, query_width, s.q_bytes, s.q_acts, s.q_stride, s.rows,
        layer.o, s.dim, layer.o, ZERO, layer.o, ZERO, s.y, s.x_stride,
    )  # fmt: skip
    return adapt(
        thread, base, s, adapters, rows, segment // 2, OUT,
        s.attention, s.attention_stride, s.y, s.x_stride,
    )  # fmt: skip


@jit(inline=True)
def _feed_forward(thread, base, weight, act, s, layer, adapters, rows, segment):
    base = norm(thread, base, weight, act, s, layer.ffn_norm, YES)
    base = product(
        thread, base, weight, act, s, s.dim, s.dim_bytes, s.dim_acts, s.dim_stride, s.rows,
        layer.w1, s.hidden_dim, layer.w3, s.hidden_dim, layer.w1, ZERO, s.hidden, s.hidden_row_stride,
    )  # fmt: skip
    base = adapt(
        thread, base, s, adapters, rows, segment // 2, UP,
        s.norm_out, s.x_stride, s.hidden, s.hidden_row_stride,
    )  # fmt: skip
    base = activate(thread, base, weight, act, s, s.rows)
    base = product(
        thread, base, weight, act, s, s.hidden_dim, s.hidden_bytes, s.hidden_acts, s.hidden_stride, s.rows,
        layer.w2, s.dim, layer.w2, ZERO, layer.w2, ZERO, s.y, s.x_stride,
    )  # fmt: skip
    return adapt(thread, base, s, adapters, rows, segment // 2, DOWN, s.hidden, s.hidden_row_stride, s.y, s.x_stride)


@jit(inline=True)
def _mixture(thread, base, weight, act, s, layer, experts):
    """Each row's mix of the outputs of the experts that it chooses."""
    base = norm(thread, base, weight, act, s, layer.ffn_norm, YES)
    base = score(thread, base, s, layer.router)
    base = choose(thread, base, s)
    group(thread, s)
    base = gather(thread, base, s)
    base = product_up(thread, base, weight, act, s, experts)
    base = activate(thread, base, weight, act, s, s.places)
    base = product_down(thread, base, weight, act, s, experts)
    return combine(thread, base, s)


@jit(inline=True)
def _output(thread, base, weight, act, s, rows):
    item = take(s.sync, base)
    while item < s.logit_rows:
        x = s.x + rows[item].wanted * s.x_stride
        out = s.norm_out + item * s.x_stride
        add(x, s.y + rows[item].wanted * s.x_stride, s.dim)
        rms_norm(x, s.final_norm, out, s.dim, s.epsilon)
        to_acts(weight, act, out, s.dim_acts + item * s.dim_stride, 0, whole_blocks(s.dim) // 32)
        item = take(s.sync, base)
    meet(s.sync, s.threads)
    base += s.logit_rows + s.threads
    return product(
        thread, base, weight, act, s, s.dim, s.dim_bytes, s.dim_acts, s.dim_stride, s.logit_rows,
        s.output, s.vocab, s.output, ZERO, s.output, ZERO, s.logits, s.logits_stride,
    )  # fmt: skip
