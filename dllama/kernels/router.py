"""The product that chooses experts: the same bits on every CPU.

Each node of a cluster works its slice of the chosen experts, so all nodes have to choose alike, whatever their CPUs
are. A sum in another order, or a multiplication and addition rounded as one, would decide a close choice another way.
"""

from dllama.kernels.emit import F32, I64, const, emitted, vec
from dllama.kernels.jit import jit

TOKENS = 4
"""Rows of activations that one row of the router is multiplied with at once; callers pad theirs to a multiple of it."""
SIXTEEN = vec(F32, 16)


def _row(tokens):
    """The product of one row of the router with ``tokens`` rows: out[t] = Σ_k w[k]·x[t, k]."""

    @emitted()
    def multiply(e, w, columns, x, x_stride, out, out_stride):
        e = e.exact()
        sums = [e.variable(const(SIXTEEN, 0.0)) for _ in range(tokens)]

        def step(weights, index):
            for t, total in enumerate(sums):
                row = e.at(x, e.mul(x_stride, const(I64, t)))
                total.set(e.fma(weights, e.load(SIXTEEN, e.at(row, e.mul(index, const(I64, 64)))), total.get()))

        whole, rest = e.udiv(columns, const(I64, 16)), e.urem(columns, const(I64, 16))
        with e.loop(whole) as index:
            step(e.load(SIXTEEN, e.at(w, e.mul(index, const(I64, 64)))), index)
        with e.if_then(e.icmp_unsigned(">", rest, const(I64, 0))):  # the last values, beside zeros
            tail = e.scratch(64)
            e.copy(tail, e.at(w, e.mul(whole, const(I64, 64))), e.mul(rest, const(I64, 4)))
            step(e.load(SIXTEEN, tail), whole)
        for t, total in enumerate(sums):
            e.store(e.sum(total.get()), e.at(out, e.mul(out_stride, const(I64, t))))

    return multiply


_multiply_one, _multiply_many = _row(1), _row(TOKENS)


@jit
def multiply_router(w, rows, columns, x, x_stride, tokens, out, out_stride):
    """out[t, r] = Σ_k w[r, k]·x[t, k] for ``rows`` rows of float32 that follow one another and ``tokens`` rows of x.

    As `dot.multiply_rows`: addresses, strides in bytes, rows of x padded with zeros to a multiple of 16 values; for
    more than one token, x and out have room for a multiple of TOKENS rows.
    """
    for r in range(rows):
        row, target = w + 4 * r * columns, out + 4 * r
        if tokens == 1:
            _multiply_one(row, columns, x, x_stride, target, out_stride)
        else:
            for t in range(0, tokens, TOKENS):
                _multiply_many(row, columns, x + t * x_stride, x_stride, target + t * out_stride, out_stride)
