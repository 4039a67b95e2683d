"""Vectors that travel between nodes: rows of floats as bytes, and the sums of several nodes' bytes as rows again.

A row as F32 is its float32 values; as Q80 it is blocks of 32 values as in a model file, a float16 scale and 32 int8.
Rows follow one another without gaps. Rows of floats are padded with zeros to a multiple of 32.
"""

from numba import types

from dllama.kernels.dot import SIXTEEN, load_floats
from dllama.kernels.elementwise import copy, floats, to_cache
from dllama.kernels.emit import I1, I64, const, emitted
from dllama.kernels.jit import jit
from dllama.kernels.packed import weight_bytes


@emitted(types.boolean)
def _has_blocks(e, form):
    return const(I1, int(form.block == 32))


@emitted()
def _add_blocks(e, form, source, target, blocks):
    """target += the values of some blocks of 32."""
    if form.block != 32:  # compiled for F32 too, which never comes here
        return
    with e.loop(blocks) as block:
        values = load_floats(e, form, e.at(source, e.mul(block, const(I64, form.nbytes))))
        for k, value in enumerate(values):
            place = e.at(target, e.add(e.mul(block, const(I64, 128)), const(I64, 64 * k)))
            e.store(e.fadd(e.load(SIXTEEN, place), value), place)


@jit(inline=True)
def _row_bytes(form, columns):
    return (columns + 31) // 32 * weight_bytes(form) if _has_blocks(form) else 4 * columns


@jit
def encode(form, x, stride, rows, columns, out):
    """Rows of floats at ``x``, ``stride`` bytes apart, as bytes at ``out``."""
    nbytes = _row_bytes(form, columns)
    for row in range(rows):
        if _has_blocks(form):
            to_cache(form, x + row * stride, out + row * nbytes, (columns + 31) // 32 * 32)
        else:
            copy(out + row * nbytes, x + row * stride, nbytes)


@jit
def decode_sum(form, sources, x, stride, rows, columns):
    """Rows of floats at ``x``: the sums of what lies at each address of ``sources``, int64 [n], added in this order."""
    nbytes = _row_bytes(form, columns)
    for row in range(rows):
        out = floats(x + row * stride, columns)
        out[:] = 0
        for source in sources:
            if _has_blocks(form):
                _add_blocks(form, source + row * nbytes, x + row * stride, (columns + 31) // 32)
            else:
                out += floats(source + row * nbytes, columns)
