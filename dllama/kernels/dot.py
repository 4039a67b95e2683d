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


def _tile(rows, tokens):
    """The product of ``rows`` rows of weights with ``tokens`` rows of floats: out[t, r] = Σ_k w[r, k]·x[t, k].

    Each sum is a chain of additions that wait for one another, whatever the tile; several side by side fill the time.
    """

    @emitted()
    def multiply(e, weight, w, w_stride, columns, x, x_stride, out, out_stride):
        sums = [[e.variable(const(SIXTEEN, 0.0)) for _ in range(tokens)] for _ in range(rows)]
        sources = [e.at(w, e.mul(w_stride, const(I64, r))) for r in range(rows)]
        vectors = [e.at(x, e.mul(x_stride, const(I64, t))) for t in range(tokens)]
        width = max(weight.block, 16)
        nbytes = width // weight.block * weight.nbytes

        def step(places, index):
            done = e.mul(index, const(I64, 4 * width))
            acts = [[e.load(SIXTEEN, e.at(v, done), 64 * i) for i in range(width // 16)] for v in vectors]
            for place, row in zip(places, sums, strict=True):
                for i, piece in enumerate(load_floats(e, weight, place)):
                    for act, total in zip(acts, row, strict=True):
                        total.set(e.fma(piece, act[i], total.get()))

        whole, rest = e.udiv(columns, const(I64, width)), e.urem(columns, const(I64, width))
        with e.loop(whole) as index:
            step([e.at(source, e.mul(index, const(I64, nbytes))) for source in sources], index)
        if weight.block == 1:  # the last values, where they don't fill a step, are worked beside zeros
            with e.if_then(e.icmp_unsigned(">", rest, const(I64, 0))):
                tails = [e.scratch(nbytes) for _ in sources]
                done = e.mul(whole, const(I64, nbytes))
                for tail, source in zip(tails, sources, strict=True):
                    e.copy(tail, e.at(source, done), e.mul(rest, const(I64, weight.nbytes)))
                step(tails, whole)
        for r, row in enumerate(sums):
            for t, total in enumerate(row):
                e.store(e.sum(total.get()), e.at(out, e.mul(out_stride, const(I64, t))), 4 * r)

    return multiply


def _rows_of(tokens):
    """Rows of weights in a tile of several tokens: as many as the sums have registers, at most four."""
    return min(4, max(1, ISA.float_sums // tokens))


TWO_ROWS, MANY_ROWS = _rows_of(2), _rows_of(TOKENS)
_multiply_one, _multiply_two, _multiply_many = _tile(1, 1), _tile(TWO_ROWS, 2), _tile(MANY_ROWS, TOKENS)


@jit
def multiply_rows(weight, w, w_stride, rows, columns, x, x_stride, tokens, out, out_stride):
    """out[t, r] = Σ_k w[r, k]·x[t, k] for ``rows`` rows of weights and ``tokens`` rows of float32.

    ``w``, ``x`` and ``out`` are addresses, strides are in bytes; out is float32. Rows of x are padded with zeros to a
    multiple of 32 values. For more than one token, x and out have room for a multiple of ``TOKENS`` rows. A sum has the
    same bits whatever is worked beside it.
    """
    height = TWO_ROWS if tokens == 2 else MANY_ROWS
    done = 0 if tokens == 1 else rows // height * height
    for r in range(0, done, height):
        source, target = w + r * w_stride, out + 4 * r
        if tokens == 2:  # as often as two texts are written at once
            _multiply_two(weight, source, w_stride, columns, x, x_stride, target, out_stride)
        else:
            for t in range(0, tokens, TOKENS):
                x_t, out_t = x + t * x_stride, target + t * out_stride
                _multiply_many(weight, source, w_stride, columns, x_t, x_stride, out_t, out_stride)
    for r in range(done, rows):
        for t in range(tokens):
            x_t, out_t = x + t * x_stride, out + t * out_stride + 4 * r
            _multiply_one(weight, w + r * w_stride, w_stride, columns, x_t, x_stride, out_t, out_stride)
