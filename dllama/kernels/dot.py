"""Rows of weights times vectors of float32, for weights of any format, read as they lie in the file.

This is the exact path (``--buffer-float-type f32``) and the one for weights that are floats themselves.
"""

from dllama.kernels import tags
from dllama.kernels.emit import F32, I8, I16, I32, I64, const, emitted, vec
from dllama.kernels.jit import ISA, jit

TOKENS = 4
"""Rows of activations that the wider form multiplies at once; callers pad theirs to a multiple of it."""
SIXTEEN = vec(F32, 16)


def load_floats(e, tag, at):
    """One block, or 16 values of an unblocked format, as vectors of 16 floats."""
    if tag is tags.F32:
        return [e.load(SIXTEEN, at)]
    if tag is tags.F16:
        return [ISA.half_to_float(e, e.load(vec(I16, 16), at))]
    scale = e.splat(e.extract_element(ISA.half_to_float(e, e.gather(I16, [at, at])), const(I32, 0)), 16)
    if tag is tags.Q80:
        pieces = [e.load(vec(I8, 16), at, 2 + 16 * i) for i in range(2)]
    else:
        packed = e.load(vec(I8, 16), at, 2)
        nibbles = e.and_(packed, const(packed.type, 15)), e.lshr(packed, const(packed.type, 4))
        pieces = [e.sub(n, const(packed.type, 8)) for n in nibbles]
    return [e.fmul(e.sitofp(p, SIXTEEN), scale) for p in pieces]


def _row(tokens):
    """The product of one row of weights with ``tokens`` rows of floats: out[t] = Σ_k w[k]·x[t, k]."""

    @emitted()
    def multiply(e, weight, w, columns, x, x_stride, out, out_stride):
        sums = [e.variable(const(SIXTEEN, 0.0)) for _ in range(tokens)]
        rows = [e.at(x, e.mul(x_stride, const(I64, t))) for t in range(tokens)]
        width = max(weight.block, 16)
        nbytes = width // weight.block * weight.nbytes

        def step(at, index):
            pieces = load_floats(e, weight, at)
            for row, total in zip(rows, sums, strict=True):
                acts = e.at(row, e.mul(index, const(I64, 4 * width)))
                for i, piece in enumerate(pieces):
                    total.set(e.fma(piece, e.load(SIXTEEN, acts, 64 * i), total.get()))

        whole, rest = e.udiv(columns, const(I64, width)), e.urem(columns, const(I64, width))
        with e.loop(whole) as index:
            step(e.at(w, e.mul(index, const(I64, nbytes))), index)
        if weight.block == 1:  # the last values, where they don't fill a step, are worked beside zeros
            with e.if_then(e.icmp_unsigned(">", rest, const(I64, 0))):
                tail = e.scratch(nbytes)
                done = e.mul(whole, const(I64, nbytes))
                e.copy(tail, e.at(w, done), e.mul(rest, const(I64, weight.nbytes)))
                step(tail, whole)
        for t, total in enumerate(sums):
            e.store(e.sum(total.get()), e.at(out, e.mul(out_stride, const(I64, t))))

    return multiply


_multiply_one, _multiply_many = _row(1), _row(TOKENS)


@jit
def multiply_rows(weight, w, w_stride, rows, columns, x, x_stride, tokens, out, out_stride):
    """out[t, r] = Σ_k w[r, k]·x[t, k] for ``rows`` rows of weights and ``tokens`` rows of float32.

    ``w``, ``x`` and ``out`` are addresses, strides are in bytes; out is float32. Rows of x are padded with zeros to a
    multiple of 32 values. For more than one token, x and out have room for a multiple of ``TOKENS`` rows.
    """
    for r in range(rows):
        row, target = w + r * w_stride, out + 4 * r
        if tokens == 1:
            _multiply_one(weight, row, columns, x, x_stride, target, out_stride)
        else:
            for t in range(0, tokens, TOKENS):
                x_t, out_t = x + t * x_stride, target + t * out_stride
                _multiply_many(weight, row, columns, x_t, x_stride, out_t, out_stride)
