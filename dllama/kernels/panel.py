"""Panels of weights times many vectors: the product that a prompt spends its time in.

Here the arithmetic is the limit, not the memory. A **panel** is R rows of weights (a few vectors of int32 lanes),
unpacked once into a thread's own cache and then multiplied with every token of the batch, a tile of tokens at a time:

    for each block, padded to whole groups of acts:
        f32  [R]         scales
        int8 [8, R, 4]   the block's 32 values, four neighbours of every row side by side

so that one product instruction serves as many rows as a vector has lanes, the activations' four values broadcast.
"""

from numba import types

from dllama.kernels import tags
from dllama.kernels.dot import ACT_BYTES, GROUP, SCALE, SECOND, START, halves, scales, start_lanes
from dllama.kernels.elementwise import copy
from dllama.kernels.emit import F32, I1, I8, I32, I64, const, emitted, vec
from dllama.kernels.isa import bytes_of
from dllama.kernels.jit import ISA, jit

LANES = ISA.vector // 4
ROWS = LANES * ISA.tile_vectors
"""Rows of a panel, R above."""
TILE = ISA.tile_tokens
"""Tokens that a product works on at once; callers pad their activations and outputs to a multiple of it."""
BLOCK_BYTES = 36 * ROWS


def panel_bytes(columns: int) -> int:
    """Bytes of a panel of rows of ``columns`` values."""
    return -(-columns // (32 * GROUP)) * GROUP * BLOCK_BYTES


@emitted()
def _unpack(e, weight, w, columns, panel, row):
    """One row of Q40 or Q80 blocks into its place in the panel."""
    if weight.block == 1:
        return
    product = ISA.nibbles if weight is tags.Q40 else ISA.int8
    quads = vec(I32, ISA.vector // 4)
    target = e.at(panel, e.mul(row, const(I64, 4)))

    def step(group, index):
        first, second = (e.bitcast(h, quads) for h in halves(e, weight, group, product))
        scale = scales(e, weight, group)
        out = e.at(target, e.mul(index, const(I64, GROUP * BLOCK_BYTES)))
        for i in range(GROUP):
            at = e.at(out, i * BLOCK_BYTES)
            e.store(e.extract_element(scale, const(I32, 4 * i)), at)
            for j in range(8):
                quad = e.extract_element((first, second)[j // 4], const(I32, 4 * i + j % 4))
                e.store(quad, at, 4 * ROWS * (1 + j))

    blocks = e.udiv(columns, const(I64, 32))
    whole, rest = e.udiv(blocks, const(I64, GROUP)), e.urem(blocks, const(I64, GROUP))
    with e.loop(whole) as index:
        step(e.at(w, e.mul(index, const(I64, GROUP * weight.nbytes))), index)
    if GROUP > 1:
        with e.if_then(e.icmp_unsigned(">", rest, const(I64, 0))):
            tail = e.scratch(GROUP * weight.nbytes)
            done = e.mul(whole, const(I64, GROUP * weight.nbytes))
            e.copy(tail, e.at(w, done), e.mul(rest, const(I64, weight.nbytes)))
            step(tail, whole)


@emitted()
def _multiply(e, weight, panel, columns, x, x_stride, out, out_stride):
    """out[t, r] for the panel's R rows and TILE tokens."""
    if weight.block == 1:
        return
    product = ISA.nibbles if weight is tags.Q40 else ISA.int8
    ints, floats, bytes_type = vec(I32, LANES), vec(F32, LANES), vec(I8, ISA.vector)
    vectors = range(ISA.tile_vectors)
    sums = [[e.variable(const(floats, 0.0)) for _ in vectors] for _ in range(TILE)]
    rows = [e.at(x, e.mul(x_stride, const(I64, t))) for t in range(TILE)]
    groups = e.udiv(e.add(columns, const(I64, 32 * GROUP - 1)), const(I64, 32 * GROUP))

    with e.loop(groups) as group:
        acts = [e.at(row, e.mul(group, const(I64, GROUP * ACT_BYTES))) for row in rows]
        for i in range(GROUP):
            block = e.at(panel, e.mul(e.add(e.mul(group, const(I64, GROUP)), const(I64, i)), const(I64, BLOCK_BYTES)))
            states = []
            for act in acts:
                start = start_lanes(e, e.splat(e.load(I32, act, START + 16 * i), LANES), weight, product)
                states.append([product.begin(e, start) for _ in vectors])
            for j in range(8):
                weights = [e.load(bytes_type, block, 4 * ROWS * (1 + j) + ISA.vector * v) for v in vectors]
                place = (0, SECOND)[j // 4] + 16 * i + 4 * (j % 4)
                for act, state in zip(acts, states, strict=True):
                    quad = bytes_of(e, e.load(I32, act, place), ISA.vector)
                    for v in vectors:
                        state[v] = product.accumulate(e, state[v], weights[v], quad)
            for v in vectors:
                scale = e.load(floats, block, ISA.vector * v)
                for act, state, total in zip(acts, states, sums, strict=True):
                    value = e.sitofp(product.finish(e, state[v]), floats)
                    both = e.fmul(scale, e.splat(e.load(F32, act, SCALE + 16 * i), LANES))
                    total[v].set(e.fma(value, both, total[v].get()))
    for t in range(TILE):
        for v in vectors:
            e.store(sums[t][v].get(), e.at(out, e.mul(out_stride, const(I64, t))), ISA.vector * v)


@emitted()
def _zero(e, at, nbytes):
    with e.loop(e.udiv(nbytes, const(I64, 4))) as index:
        e.store(const(I32, 0), e.at(at, e.mul(index, const(I64, 4))))


@emitted(types.boolean)
def has_panels(e, weight, act):
    """Whether this combination has the panel form: quantised weights met by quantised activations."""
    return const(I1, int(weight.block == 32 and act is tags.Q80))


@jit
def dot_panels(weight, w, w_stride, rows, columns, x, x_stride, tokens, out, out_stride, panel, spare):
    """The same as ``dot.dot_rows`` for many tokens, where ``has_panels``.

    ``panel``: scratch of ``panel_bytes(columns)``; ``spare``: scratch of 4·TILE·ROWS bytes. x and out have room for
    a multiple of TILE tokens.
    """
    groups_bytes = (columns + 32 * GROUP - 1) // (32 * GROUP) * GROUP * BLOCK_BYTES
    for first in range(0, rows, ROWS):
        here = min(ROWS, rows - first)
        if here < ROWS or columns % (32 * GROUP) != 0:
            _zero(panel, groups_bytes)
        for r in range(here):
            _unpack(weight, w + (first + r) * w_stride, columns, panel, r)
        for t in range(0, tokens, TILE):
            if here == ROWS:
                _multiply(weight, panel, columns, x + t * x_stride, x_stride, out + t * out_stride + 4 * first, out_stride)
            else:  # the last rows: beside zeros, and only the valid ones leave
                _multiply(weight, panel, columns, x + t * x_stride, x_stride, spare, 4 * ROWS)
                for i in range(min(TILE, tokens - t)):
                    copy(out + (t + i) * out_stride + 4 * first, spare + i * 4 * ROWS, 4 * here)
