"""Attention of queries over the rows of a KV cache, in any of the cache's formats.

Heads that share their keys and values (grouped-query attention) are worked together, so that a key is loaded and
converted once for several of them.
"""

import numpy as np

from dllama.kernels import tags
from dllama.kernels.dot import SIXTEEN, load_floats
from dllama.kernels.elementwise import floats, softmax
from dllama.kernels.emit import F32, I64, const, emitted
from dllama.kernels.jit import ISA, jit

HEADS = 4
"""Heads of one group that are worked at once."""
SUMS = 16 if ISA.vector == 64 else 4
"""Running sums that fit into the registers, each of 16 floats."""


def cache_row_bytes(cache: tags.Tag, head_dim: int) -> int:
    """Bytes of one head's key or value at one position; head_dim is padded to a multiple of 32."""
    return -(-head_dim // 32) * 32 // cache.block * cache.nbytes


def _load_32(e, cache, row, block):
    """32 values of a cache row as two vectors of 16 floats."""
    nbytes = 32 // cache.block * cache.nbytes
    at = e.at(row, e.mul(block, const(I64, nbytes)))
    if cache.block == 32:
        return load_floats(e, cache, at)
    return [load_floats(e, cache, e.at(at, 16 * cache.nbytes * k))[0] for k in (0, 1)]


def _scores(heads):
    """out[h, p] = scale · queries[h]·keys[p] for some heads; 16 sums are brought to one vector of sums by a tree."""
    at_once = SUMS // heads

    @emitted()
    def scores(e, cache, queries, query_stride, keys, key_stride, positions, head_dim, scale, out, out_stride):
        def rows(first, count):
            sums = [[e.variable(const(SIXTEEN, 0.0)) for _ in range(count)] for _ in range(heads)]
            starts = [e.at(keys, e.mul(e.add(first, const(I64, p)), key_stride)) for p in range(count)]
            with e.loop(_blocks(e, head_dim)) as block:
                wanted = [e.at(queries, e.mul(query_stride, const(I64, h))) for h in range(heads)]
                q = [_load_32(e, tags.F32, query, block) for query in wanted]
                for p, start in enumerate(starts):
                    for k, key in enumerate(_load_32(e, cache, start, block)):
                        for h in range(heads):
                            sums[h][p].set(e.fma(q[h][k], key, sums[h][p].get()))
            totals = [[total.get() for total in row] for row in sums]
            if heads * count == 16:
                joined = e.fmul(_sums(e, sum(totals, [])), e.splat(scale, 16))
                for h in range(heads):
                    e.store(e.pick(joined, range(h * count, (h + 1) * count)), target(h, first))
                return
            for h in range(heads):
                for p in range(count):
                    e.store(e.fmul(scale, e.sum(totals[h][p])), target(h, e.add(first, const(I64, p))))

        def target(head, position):
            row = e.at(out, e.mul(out_stride, const(I64, head)))
            return e.at(row, e.mul(position, const(I64, 4)))

        _unrolled(e, positions, at_once, rows)

    return scores


def _values(heads):
    """out[h] = scales[h] · Σ_p weights[h, p]·values[p] for some heads, padded to a multiple of 32 floats."""
    at_once = max(SUMS // (2 * heads), 1)

    @emitted()
    def values(e, cache, weights, weight_stride, values, value_stride, positions, head_dim, scales, out, out_stride):
        with e.loop(_blocks(e, head_dim)) as block:
            sums = [[[e.variable(const(SIXTEEN, 0.0)) for _ in range(2)] for _ in range(at_once)] for _ in range(heads)]

            def rows(first, count):
                for p in range(count):
                    position = e.add(first, const(I64, p))
                    pieces = _load_32(e, cache, e.at(values, e.mul(position, value_stride)), block)
                    for h in range(heads):
                        row = e.at(weights, e.mul(weight_stride, const(I64, h)))
                        weight = e.splat(e.load(F32, e.at(row, e.mul(position, const(I64, 4)))), 16)
                        for total, piece in zip(sums[h][p], pieces, strict=True):
                            total.set(e.fma(weight, piece, total.get()))

            _unrolled(e, positions, at_once, rows)
            for h in range(heads):
                scale = e.splat(e.load(F32, scales, 4 * h), 16)
                row = e.at(e.at(out, e.mul(out_stride, const(I64, h))), e.mul(block, const(I64, 128)))
                for k in range(2):
                    total = sums[h][0][k].get()
                    for other in sums[h][1:]:
                        total = e.fadd(total, other[k].get())
                    e.store(e.fmul(total, scale), row, 64 * k)

    return values


def _sums(e, vectors):
    """16 vectors of 16 floats → one vector of their sums: neighbours are added, and two vectors become one."""
    while len(vectors) > 1:
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [e.fadd(e.pick(a, range(0, 32, 2), b), e.pick(a, range(1, 32, 2), b)) for a, b in pairs]
    return vectors[0]


_scores_one, _scores_some = _scores(1), _scores(HEADS)
_values_one, _values_some = _values(1), _values(HEADS)


@jit
def attend(cache, queries, stride, heads, keys, values, row_bytes, positions, head_dim, scores, scores_stride, out):
    """Attention of ``heads`` heads, 1 or HEADS, that share keys and values: out[h] = softmax(q[h]·Kᵀ/√head_dim)·V.

    queries, out: float32 [heads, head_dim padded with zeros to a multiple of 32], ``stride`` bytes apart; keys,
    values: ``positions`` cache rows, ``row_bytes`` apart; scores: scratch of HEADS rows of positions + 16 floats, and
    after them room for HEADS floats.
    """
    scale = np.float32(1) / np.sqrt(np.float32(head_dim))
    sums = scores + HEADS * scores_stride
    if heads == HEADS:
        _scores_some(cache, queries, stride, keys, row_bytes, positions, head_dim, scale, scores, scores_stride)
    else:
        _scores_one(cache, queries, stride, keys, row_bytes, positions, head_dim, scale, scores, scores_stride)
    inverse = floats(sums, HEADS)
    for h in range(heads):
        inverse[h] = np.float32(1) / softmax(scores + h * scores_stride, positions)
    if heads == HEADS:
        _values_some(cache, scores, scores_stride, values, row_bytes, positions, head_dim, sums, out, stride)
    else:
        _values_one(cache, scores, scores_stride, values, row_bytes, positions, head_dim, sums, out, stride)


def _blocks(e, head_dim):
    return e.udiv(e.add(head_dim, const(I64, 31)), const(I64, 32))


def _unrolled(e, count, at_once, body):
    """``body(first, n)`` over 0..count, n = ``at_once`` at a time and the rest one by one."""
    whole = e.udiv(count, const(I64, at_once))
    with e.loop(whole) as i:
        body(e.mul(i, const(I64, at_once)), at_once)
    if at_once > 1:
        done = e.mul(whole, const(I64, at_once))
        with e.loop(e.sub(count, done)) as i:
            body(e.add(done, i), 1)
