"""Vectors that travel between nodes: rows of floats as bytes, and the sums of several nodes' bytes as rows again.

A row as F32 is its float32 values; as Q80 it is blocks of 32 values as in a model file, a float16 scale and 32 int8;
as F16 it is its float16 values, filled up to a multiple of 32. Rows follow one another without gaps. Rows of floats are
padded with zeros to a multiple of 32.
"""

from numba import types

from dllama.kernels import tags
from dllama.kernels.dot import SIXTEEN, load_floats
from dllama.kernels.elementwise import copy, floats, to_cache
from dllama.kernels.emit import I1, I64, const, emitted
from dllama.kernels.jit import jit


@emitted(types.boolean)
def _is_plain(e, form):
    return const(I1, int(form is tags.F32))


@emitted(types.int64)
def _block_bytes(e, form):
    """Bytes of 32 values."""
    return const(I64, 32 // form.block * form.nbytes)


@emitted()
def _add_blocks(e, form, source, target, blocks):
    """target += the values of some blocks of 32."""
    half = 16 * form.nbytes
    with e.loop(blocks) as block:
        at = e.at(source, e.mul(block, const(I64, 32 // form.block * form.nbytes)))
        values = load_floats(e, form, at)
        if len(values) == 1:
            values += load_floats(e, form, e.at(at, const(I64, half)))
        for k, value in enumerate(values):
            place = e.at(target, e.add(e.mul(block, const(I64, 128)), const(I64, 64 * k)))
            e.store(e.fadd(e.load(SIXTEEN, place), value), place)


@jit(inline=True)
def row_bytes(form, columns):
    return 4 * columns if _is_plain(form) else (columns + 31) // 32 * _block_bytes(form)


@jit
def encode(form, x, stride, rows, columns, out):
    """Rows of floats at ``x``, ``stride`` bytes apart, as bytes at ``out``."""
    nbytes = row_bytes(form, columns)
    for row in range(rows):
        if _is_plain(form):
            copy(out + row * nbytes, x + row * stride, nbytes)
        else:
            to_cache(form, x + row * stride, out + row * nbytes, (columns + 31) // 32 * 32)


@jit
def decode_sum(form, sources, x, stride, rows, columns):
    """Rows of floats at ``x``: the sums of what lies at each address of ``sources``, int64 [n], added in this order."""
    nbytes = row_bytes(form, columns)
    for row in range(rows):
        out = floats(x + row * stride, columns)
        out[:] = 0
        for source in sources:
            if _is_plain(form):
                out += floats(source + row * nbytes, columns)
            else:
                _add_blocks(form, source + row * nbytes, x + row * stride, (columns + 31) // 32)
