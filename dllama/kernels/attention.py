"""Attention of one query over the rows of a KV cache, in any of the cache's formats."""

from dllama.kernels import tags
from dllama.kernels.dot import load_floats
from dllama.kernels.emit import F32, I64, const, emitted, vec

SIXTEEN = vec(F32, 16)
UNROLL = 4
"""Positions worked at once, so that the additions of one don't wait for the last."""


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


@emitted()
def attention_scores(e, cache, query, keys, key_stride, positions, head_dim, scale, out):
    """out[p] = scale · query·keys[p] for each position; query is float32 padded with zeros to a multiple of 32."""

    blocks = e.udiv(e.add(head_dim, const(I64, 31)), const(I64, 32))

    def rows(first, count):
        sums = [e.variable(const(SIXTEEN, 0.0)) for _ in range(count)]
        starts = [e.at(keys, e.mul(e.add(first, const(I64, p)), key_stride)) for p in range(count)]
        with e.loop(blocks) as block:
            q = _load_32(e, tags.F32, query, block)
            for start, total in zip(starts, sums, strict=True):
                for a, b in zip(q, _load_32(e, cache, start, block), strict=True):
                    total.set(e.fma(a, b, total.get()))
        for p, total in enumerate(sums):
            target = e.at(out, e.mul(e.add(first, const(I64, p)), const(I64, 4)))
            e.store(e.fmul(scale, e.sum(total.get())), target)

    _unrolled(e, positions, rows)


@emitted()
def attention_values(e, cache, weights, values, value_stride, positions, head_dim, scale, out):
    """out = scale · Σ_p weights[p]·values[p], float32, padded to a multiple of 32."""
    with e.loop(e.udiv(e.add(head_dim, const(I64, 31)), const(I64, 32))) as block:
        sums = [[e.variable(const(SIXTEEN, 0.0)) for _ in range(2)] for _ in range(UNROLL)]

        def rows(first, count, sums=sums, block=block):
            for p in range(count):
                position = e.add(first, const(I64, p))
                weight = e.splat(e.load(F32, e.at(weights, e.mul(position, const(I64, 4)))), 16)
                row = e.at(values, e.mul(position, value_stride))
                for total, piece in zip(sums[p], _load_32(e, cache, row, block), strict=True):
                    total.set(e.fma(weight, piece, total.get()))

        _unrolled(e, positions, rows)
        for k in range(2):
            parts = [s[k].get() for s in sums]
            total = e.fadd(e.fadd(parts[0], parts[1]), e.fadd(parts[2], parts[3]))
            e.store(e.fmul(total, e.splat(scale, 16)), e.at(out, e.mul(block, const(I64, 128))), 64 * k)


def _unrolled(e, count, body):
    """``body(first, n)`` over 0..count, n = UNROLL at a time and the rest one by one."""
    whole = e.udiv(count, const(I64, UNROLL))
    with e.loop(whole) as i:
        body(e.mul(i, const(I64, UNROLL)), UNROLL)
    done = e.mul(whole, const(I64, UNROLL))
    with e.loop(e.sub(count, done)) as i:
        body(e.add(done, i), 1)
