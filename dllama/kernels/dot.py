"""Rows of weights times vectors: the product that decoding spends its time in.

The weights are read as they lie in the file, row after row of blocks: a linear walk through memory at the memory's
speed, and nothing to repack or to keep twice. (Two rows at once would share the loads of activations, but the
hardware prefetchers lose the streams: measured a third of the rate.) A step takes as many blocks as fill a vector
register, the first halves of the blocks in one register and the second halves in another; activations lie in the
matching order.

Quantised activations, the **acts** layout: groups of G = vector bytes / 16 blocks, 64·G bytes a group:

    int8  [G, 16]   first halves of G blocks
    int8  [G, 16]   second halves
    int32 [G, 4]    -8·Σq of each block, then three zeros: takes off the offset of 8 that nibbles have
    f32   [G, 4]    the scale of each block, four times

Float activations are float32, padded with zeros to a multiple of 32.
"""

from dllama.kernels import tags
from dllama.kernels.emit import F32, I8, I16, I32, I64, const, emitted, vec
from dllama.kernels.isa import replicate
from dllama.kernels.jit import ISA, jit

GROUP = ISA.vector // 16
"""Blocks in a step, G above."""
ACT_BYTES = 64
"""Bytes of the acts layout for each block."""
SECOND, START, SCALE = 16 * GROUP, 32 * GROUP, 48 * GROUP
"""Offsets within a group of acts."""
TOKENS = 4
"""Rows of activations that the wider form multiplies at once; callers pad theirs to a multiple of it."""


def act_stride(act: tags.Tag, columns: int) -> int:
    """Bytes that a row of ``columns`` activations takes in the layout above."""
    if act is tags.F32:
        return 4 * 32 * -(-columns // 32)
    return -(-columns // (32 * GROUP)) * GROUP * ACT_BYTES


def halves(e, tag, group, product):
    """First and second halves of a group's G blocks of weights at address ``group``, as ``product`` wants them."""
    bytes_type, half = vec(I8, ISA.vector), vec(I8, 16)
    blocks = [e.at(group, tag.nbytes * i + 2) for i in range(GROUP)]
    if tag is tags.Q80:
        return [product.prepare(e, e.concat([e.load(half, b, first) for b in blocks])) for first in (0, 16)]
    if GROUP == 4:  # 4·18 bytes: two overlapping loads and one shuffle beat four loads put together
        source = [18 * (i // 16) + 2 + i % 16 for i in range(64)]
        low, high = e.load(bytes_type, group), e.load(bytes_type, group, 8)
        nibbles = e.pick(low, [i if i < 64 else i - 8 + 64 for i in source], high)
    else:
        nibbles = e.concat([e.load(half, b) for b in blocks])
    return e.and_(nibbles, const(bytes_type, 15)), e.lshr(nibbles, const(bytes_type, 4))


def scales(e, tag, group):
    """The f16 scales of a group's blocks as floats, each four times."""
    if GROUP == 4 and tag is tags.Q40:
        words = e.load(vec(I16, 32), group)
        return ISA.half_to_float(e, e.pick(words, [9 * (i // 4) for i in range(16)]))
    found = e.gather(I16, [e.at(group, tag.nbytes * i) for i in range(GROUP)])
    return replicate(e, ISA.half_to_float(e, found), 4)


def start_lanes(e, start, tag, product):
    """The acts' -8·Σq as the product needs it: for int8 weights the multiple that fits its own offset."""
    if tag is tags.Q40:
        return start
    return e.mul(start, const(start.type, product.offset // 8))


def _quantised(e, tag, tokens, w, columns, x, x_stride, out, out_stride):
    """out[t] = Σ_k w[k]·x[t, k] for one row of Q40 or Q80 blocks."""
    product = ISA.nibbles if tag is tags.Q40 else ISA.int8
    bytes_type, floats, lanes = vec(I8, ISA.vector), vec(F32, ISA.vector // 4), vec(I32, ISA.vector // 4)
    sums = [e.variable(const(floats, 0.0)) for _ in range(tokens)]
    rows = [e.at(x, e.mul(x_stride, const(I64, t))) for t in range(tokens)]

    def step(group, index):
        first, second = halves(e, tag, group, product)
        scale = scales(e, tag, group)
        for row, total in zip(rows, sums, strict=True):
            acts = e.at(row, e.mul(index, const(I64, GROUP * ACT_BYTES)))
            state = product.begin(e, start_lanes(e, e.load(lanes, acts, START), tag, product))
            state = product.accumulate(e, state, first, e.load(bytes_type, acts))
            state = product.accumulate(e, state, second, e.load(bytes_type, acts, SECOND))
            value = e.sitofp(product.finish(e, state), floats)
            total.set(e.fma(value, e.fmul(scale, e.load(floats, acts, SCALE)), total.get()))

    blocks = e.udiv(columns, const(I64, 32))
    whole, rest = e.udiv(blocks, const(I64, GROUP)), e.urem(blocks, const(I64, GROUP))
    with e.loop(whole) as index:
        step(e.at(w, e.mul(index, const(I64, GROUP * tag.nbytes))), index)
    if GROUP > 1:  # the last blocks, where they don't fill a step, are worked beside zeros
        with e.if_then(e.icmp_unsigned(">", rest, const(I64, 0))):
            tail = e.scratch(GROUP * tag.nbytes)
            e.copy(tail, e.at(w, e.mul(whole, const(I64, GROUP * tag.nbytes))), e.mul(rest, const(I64, tag.nbytes)))
            step(tail, whole)
    for t, total in enumerate(sums):
        e.store(e.sum(total.get()), e.at(out, e.mul(out_stride, const(I64, t))))


def load_floats(e, tag, at):
    """One block, or 16 values of an unblocked format, as vectors of 16 floats."""
    sixteen = vec(F32, 16)
    if tag is tags.F32:
        return [e.load(sixteen, at)]
    if tag is tags.F16:
        return [ISA.half_to_float(e, e.load(vec(I16, 16), at))]
    scale = e.splat(e.extract_element(ISA.half_to_float(e, e.gather(I16, [at, at])), const(I32, 0)), 16)
    if tag is tags.Q80:
        pieces = [e.load(vec(I8, 16), at, 2 + 16 * i) for i in range(2)]
    else:
        packed = e.load(vec(I8, 16), at, 2)
        nibbles = e.and_(packed, const(packed.type, 15)), e.lshr(packed, const(packed.type, 4))
        pieces = [e.sub(n, const(packed.type, 8)) for n in nibbles]
    return [e.fmul(e.sitofp(p, sixteen), scale) for p in pieces]


def _float(e, tag, tokens, w, columns, x, x_stride, out, out_stride):
    """The same with float32 activations, for a row of any weights."""
    sixteen = vec(F32, 16)
    sums = [e.variable(const(sixteen, 0.0)) for _ in range(tokens)]
    rows = [e.at(x, e.mul(x_stride, const(I64, t))) for t in range(tokens)]
    width = max(tag.block, 16)
    nbytes = width // tag.block * tag.nbytes

    def step(at, index):
        pieces = load_floats(e, tag, at)
        for row, total in zip(rows, sums, strict=True):
            acts = e.at(row, e.mul(index, const(I64, 4 * width)))
            for i, piece in enumerate(pieces):
                total.set(e.fma(piece, e.load(sixteen, acts, 64 * i), total.get()))

    whole, rest = e.udiv(columns, const(I64, width)), e.urem(columns, const(I64, width))
    with e.loop(whole) as index:
        step(e.at(w, e.mul(index, const(I64, nbytes))), index)
    if tag.block == 1:
        with e.if_then(e.icmp_unsigned(">", rest, const(I64, 0))):
            tail = e.scratch(nbytes)
            e.copy(tail, e.at(w, e.mul(whole, const(I64, nbytes))), e.mul(rest, const(I64, tag.nbytes)))
            step(tail, whole)
    for t, total in enumerate(sums):
        e.store(e.sum(total.get()), e.at(out, e.mul(out_stride, const(I64, t))))


def _row(tokens):
    @emitted()
    def row(e, weight, act, w, columns, x, x_stride, out, out_stride):
        emit = _quantised if act is tags.Q80 and weight.block == 32 else _float
        emit(e, weight, tokens, w, columns, x, x_stride, out, out_stride)

    return row


_row_of_one, _row_of_many = _row(1), _row(TOKENS)


@jit
def dot_rows(weight, act, w, w_stride, rows, columns, x, x_stride, tokens, out, out_stride):
    """out[t, r] = Σ_k w[r, k]·x[t, k] for ``rows`` rows of weights and ``tokens`` rows of activations.

    ``weight`` and ``act`` are tags. ``w``, ``x`` and ``out`` are addresses, strides are in bytes; out is float32.
    For more than one token, x and out must have room for a multiple of ``TOKENS`` rows.
    """
    if tokens == 1:
        for r in range(rows):
            _row_of_one(weight, act, w + r * w_stride, columns, x, x_stride, out + 4 * r, out_stride)
        return
    for r in range(rows):
        for t in range(0, tokens, TOKENS):
            x_t, out_t = x + t * x_stride, out + t * out_stride + 4 * r
            _row_of_many(weight, act, w + r * w_stride, columns, x_t, x_stride, out_t, out_stride)
