"""Quantised weights times quantised activations: the product that the speed of everything depends on.

**Packed weights.** R rows (as many int32 lanes as the kernels work at once) are interleaved, so that one load feeds
all of them and no sum across lanes is ever needed. For each block of 32 columns, the same bytes as in the file in
another order:

    f16   [R]           scales
    bytes [4 or 8, R, 4]  four neighbouring bytes of every row: Q40's 16 bytes of nibbles, or Q80's 32 int8

Rows are padded with zeros to a multiple of R. Decoding walks through this from front to back, at the memory's speed.

**Acts.** Activations in Q80, each block 40 bytes, which every lane reads by broadcasts of 4 bytes:

    int8 [32] values, f32 scale, int32 -8·Σ values (takes off the offset of 8 that nibbles have)
"""

from numba import types

from dllama.kernels import tags
from dllama.kernels.emit import F32, I1, I8, I16, I32, I64, const, emitted, vec
from dllama.kernels.jit import ISA, jit
from dllama.kernels.team import take

LANES = ISA.vector // 4
ROWS = LANES * ISA.tile_vectors
"""Rows that are interleaved, R above; at most 32."""
ACT_BYTES, ACT_SCALE, ACT_SUM = 40, 32, 36
"""Bytes of a block of acts, and the offsets of its scale and sum."""
FEW, MANY = 4, ISA.tile_tokens
"""Tokens that the wider forms multiply at once. Callers pad acts and outputs to a multiple of TOKENS rows."""
TOKENS = max(FEW, MANY)
CACHE_LINE = 64


def is_packed(weight: tags.Tag, act: tags.Tag) -> bool:
    """Whether this combination is worked by these kernels, on packed weights."""
    return weight.block == 32 and act is tags.Q80


def packed_bytes(weight: tags.Tag, rows: int, columns: int) -> int:
    """Bytes of a packed matrix."""
    return -(-rows // ROWS) * ROWS * (columns // 32) * weight.nbytes


@emitted(types.boolean)
def uses_packed(e, weight, act):
    """``is_packed`` for compiled code."""
    return const(I1, int(is_packed(weight, act)))


@emitted(types.int64)
def weight_bytes(e, weight):
    """Bytes of a block of weights."""
    return const(I64, weight.nbytes)


def _product(weight, tokens=1):
    return ISA.nibbles_for(tokens) if weight is tags.Q40 else ISA.int8


@emitted()
def _pack_row(e, weight, source, blocks, target, lane):
    """One row of blocks into its lane of a packed group of rows."""
    flip = const(I32, -0x7F7F7F80) if _product(weight).offset == 128 else None
    with e.loop(blocks) as block:
        start = e.at(source, e.mul(block, const(I64, weight.nbytes)))
        group = e.at(target, e.mul(block, const(I64, ROWS * weight.nbytes)))
        e.store(e.load(I16, start), e.at(group, e.mul(lane, const(I64, 2))))
        place = e.at(group, e.mul(lane, const(I64, 4)))
        for quad in range((weight.nbytes - 2) // 4):
            value = e.load(I32, start, 2 + 4 * quad)
            e.store(value if flip is None else e.xor(value, flip), place, ROWS * (2 + 4 * quad))


@jit
def pack(thread, sync, weight, source, stride, rows, columns, target):
    """Packs ``rows`` rows of blocks, ``stride`` bytes apart, into zeroed memory at ``target``; run by a whole team."""
    nbytes = columns // 32 * ROWS * weight_bytes(weight)
    group = take(sync, 0)
    while group * ROWS < rows:
        for lane in range(min(ROWS, rows - group * ROWS)):
            row = source + (group * ROWS + lane) * stride
            _pack_row(weight, row, columns // 32, target + group * nbytes, lane)
        group = take(sync, 0)


def _tile(tokens):
    """The product of one packed group with ``tokens`` rows of acts: out[t, r] = Σ_k w[r, k]·x[t, k]."""

    @emitted()
    def multiply(e, weight, w, columns, x, x_stride, out, out_stride):
        if weight.block == 1:  # compiled for float weights too, which never come here
            return
        product = _product(weight, tokens)
        floats, whole = vec(F32, LANES), vec(I8, ISA.vector)
        vectors = range(ISA.tile_vectors)
        sums = [[e.variable(const(floats, 0.0)) for _ in vectors] for _ in range(tokens)]
        rows = [e.at(x, e.mul(x_stride, const(I64, t))) for t in range(tokens)]

        with e.loop(e.udiv(columns, const(I64, 32))) as block:
            group = e.at(w, e.mul(block, const(I64, ROWS * weight.nbytes)))
            for ahead, level in ISA.ahead if tokens > 1 else ():  # with one the hardware asks for enough by itself
                for line in range(0, ROWS * weight.nbytes, CACHE_LINE):
                    e.prefetch(e.at(group, ahead + line), level)
            acts = [e.at(row, e.mul(block, const(I64, ACT_BYTES))) for row in rows]
            states = [[product.begin(e, _start(e, weight, act)) for _ in vectors] for act in acts]

            quads = [ISA.quads(e, act) for act in acts]
            for i in range((weight.nbytes - 2) // 4):
                stored = [e.load(whole, group, ROWS * (2 + 4 * i) + ISA.vector * v) for v in vectors]
                for quad, state in zip(quads, states, strict=True):
                    for v in vectors:
                        if weight is tags.Q40:
                            state[v] = product.accumulate_nibbles(e, state[v], stored[v], quad[i], quad[4 + i])
                        else:
                            state[v] = product.accumulate(e, state[v], stored[v], quad[i])
            for v in vectors:
                scale = ISA.half_to_float(e, e.load(vec(I16, LANES), group, 2 * LANES * v))
                for act, state, total in zip(acts, states, sums, strict=True):
                    value = e.sitofp(product.finish(e, state[v]), floats)
                    both = e.fmul(scale, e.splat(e.load(F32, act, ACT_SCALE), LANES))
                    total[v].set(e.fma(value, both, total[v].get()))
        for t in range(tokens):
            for v in vectors:
                e.store(sums[t][v].get(), e.at(out, e.mul(out_stride, const(I64, t))), ISA.vector * v)

    def _start(e, weight, act):
        """Where the int32 sums begin, so that the weights' offset cancels: -offset·Σ values."""
        product = _product(weight, tokens)
        total = e.load(I32, act, ACT_SUM)
        if weight is tags.Q80:
            total = e.mul(total, const(I32, product.offset // 8))
        return e.splat(total, LANES)

    return multiply


_multiply_one, _multiply_two, _multiply_few, _multiply_many = _tile(1), _tile(2), _tile(FEW), _tile(MANY)


@jit
def multiply_packed(weight, w, groups, columns, x, x_stride, tokens, out, out_stride):
    """out[t, r] = Σ_k w[r, k]·x[t, k] for ``groups`` groups of ROWS packed rows and ``tokens`` rows of acts.

    ``w``, ``x`` and ``out`` are addresses, strides are in bytes, out is float32. For more than one token x and out
    have room for a multiple of TOKENS rows.
    """
    nbytes = columns // 32 * ROWS * weight_bytes(weight)
    for g in range(groups):
        source, target = w + g * nbytes, out + 4 * ROWS * g
        if tokens == 1:
            _multiply_one(weight, source, columns, x, x_stride, target, out_stride)
        elif tokens == 2:  # as often as two texts are written at once
            _multiply_two(weight, source, columns, x, x_stride, target, out_stride)
        elif tokens <= FEW:
            _multiply_few(weight, source, columns, x, x_stride, target, out_stride)
        else:
            for t in range(0, tokens, MANY):
                x_t, out_t = x + t * x_stride, target + t * out_stride
                _multiply_many(weight, source, columns, x_t, x_stride, out_t, out_stride)
