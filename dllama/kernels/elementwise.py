"""Norms, activations and conversions between layouts: the work between two products.

All addresses point to float32 rows padded with zeros to a multiple of 32 values, unless a layout is named.
"""

import numpy as np
from numba import carray, types

from dllama.kernels import tags
from dllama.kernels.dot import load_floats
from dllama.kernels.emit import F32, I8, I32, I64, const, emitted, vec
from dllama.kernels.jit import ISA, jit
from dllama.kernels.packed import ACT_BYTES, ACT_SCALE, ACT_SUM, is_packed

SIXTEEN = vec(F32, 16)


@emitted()
def copy(e, target, source, nbytes):
    e.copy(target, source, nbytes)


@emitted(types.voidptr)
def _pointer(e, address):
    return e.inttoptr(address, I8.as_pointer())


@jit(inline=True)
def floats(address, n):
    """The n float32 at an address as an array."""
    return carray(_pointer(address), (n,), np.float32)


@jit(inline=True)
def integers(address, n):
    """The n int64 at an address as an array."""
    return carray(_pointer(address), (n,), np.int64)


@emitted()
def add(e, x, y, n):
    """x += y."""
    with e.loop(_sixteens(e, n)) as i:
        at = e.mul(i, const(I64, 64))
        e.store(e.fadd(e.load(SIXTEEN, e.at(x, at)), e.load(SIXTEEN, e.at(y, at))), e.at(x, at))


@emitted()
def scale(e, x, y, factor, n):
    """x = factor·y."""
    factors = e.splat(factor, 16)
    with e.loop(_sixteens(e, n)) as i:
        at = e.mul(i, const(I64, 64))
        e.store(e.fmul(factors, e.load(SIXTEEN, e.at(y, at))), e.at(x, at))


@emitted()
def add_scaled(e, form, x, y, factor, n):
    """x += factor·y, with y F32 or F16."""
    factors = e.splat(factor, 16)
    with e.loop(_sixteens(e, n)) as i:
        at = e.at(x, e.mul(i, const(I64, 64)))
        (value,) = load_floats(e, form, e.at(y, e.mul(i, const(I64, 16 * form.nbytes))))
        e.store(e.fma(factors, value, e.load(SIXTEEN, at)), at)


SUMMANDS = 4
"""That are added at once below: each value of x is read and written once for all of them."""


def _add_summands(rows):
    """x[r] += Σ_k factors[r, k]·y[k] for ``rows`` rows of x and SUMMANDS of y, F32 or F16, in the order of k; strides
    in bytes. Rows of x share what is read of y."""

    @emitted()
    def add(e, form, x, x_stride, y, y_stride, factors, factors_stride, n):
        outs = [e.at(x, e.mul(x_stride, const(I64, r))) for r in range(rows)]
        scales = [
            [
                e.splat(e.load(F32, e.at(factors, e.mul(factors_stride, const(I64, r))), 4 * k), 16)
                for k in range(SUMMANDS)
            ]
            for r in range(rows)
        ]
        starts = [e.at(y, e.mul(y_stride, const(I64, k))) for k in range(SUMMANDS)]
        with e.loop(_sixteens(e, n)) as i:
            done = e.mul(i, const(I64, 16 * form.nbytes))
            values = [load_floats(e, form, e.at(start, done))[0] for start in starts]
            for out, row in zip(outs, scales, strict=True):
                at = e.at(out, e.mul(i, const(I64, 64)))
                total = e.load(SIXTEEN, at)
                for factor, value in zip(row, values, strict=True):
                    total = e.fma(factor, value, total)
                e.store(total, at)

    return add


add_summands, add_summands_to_two = _add_summands(1), _add_summands(2)


@emitted()
def rms_norm(e, x, weight, out, n, epsilon):
    """out = x / √(mean(x²) + ε) · weight, the mean over the true length n (Zhang and Sennrich, 2019).

    The same bits on every CPU: nodes that norm the same row choose by it (`router`).
    """
    e = e.exact()
    total = e.variable(const(SIXTEEN, 0.0))
    with e.loop(_sixteens(e, n)) as i:
        value = e.load(SIXTEEN, e.at(x, e.mul(i, const(I64, 64))))
        total.set(e.fma(value, value, total.get()))
    mean = e.fdiv(e.sum(total.get()), e.sitofp(n, F32))
    root = e.call("llvm.sqrt.v16f32", SIXTEEN, e.splat(e.fadd(mean, epsilon), 16))
    factor = e.fdiv(const(SIXTEEN, 1.0), root)
    with e.loop(_sixteens(e, n)) as i:
        at = e.mul(i, const(I64, 64))
        value = e.fmul(e.load(SIXTEEN, e.at(x, at)), factor)
        e.store(e.fmul(value, e.load(SIXTEEN, e.at(weight, at))), e.at(out, at))


@emitted()
def silu_times(e, gate, up, n):
    """gate = gate·σ(gate)·up (SwiGLU: Shazeer, 2020)."""
    with e.loop(_sixteens(e, n)) as i:
        at = e.mul(i, const(I64, 64))
        g = e.load(SIXTEEN, e.at(gate, at))
        e.store(e.fmul(_times_sigmoid(e, g, g), e.load(SIXTEEN, e.at(up, at))), e.at(gate, at))


@emitted()
def gelu_times(e, gate, up, n):
    """gate = gelu(gate)·up with the tanh form of GELU: x·σ(2·√(2/π)·(x + 0.044715·x³))."""
    with e.loop(_sixteens(e, n)) as i:
        at = e.mul(i, const(I64, 64))
        g = e.load(SIXTEEN, e.at(gate, at))
        cubic = e.fma(e.fmul(const(SIXTEEN, 0.044715), e.fmul(g, g)), g, g)
        inner = e.fmul(const(SIXTEEN, 1.5957691216057308), cubic)
        e.store(e.fmul(_times_sigmoid(e, g, inner), e.load(SIXTEEN, e.at(up, at))), e.at(gate, at))


@emitted(types.float32)
def softmax(e, scores, n):
    """scores = exp(scores - max) in place; returns their sum. Room for a multiple of 16 values is overwritten."""
    lowest = const(SIXTEEN, -1e30)
    rest = e.and_(n, const(I64, 15))
    with e.if_then(e.icmp_unsigned(">", rest, const(I64, 0))):
        with e.loop(e.sub(const(I64, 16), rest)) as i:
            e.store(const(F32, -1e30), e.at(scores, e.mul(e.add(n, i), const(I64, 4))))
    highest = e.variable(lowest)
    with e.loop(_sixteens(e, n)) as i:
        value = e.load(SIXTEEN, e.at(scores, e.mul(i, const(I64, 64))))
        highest.set(_maximum(e, highest.get(), value))
    top = e.splat(_reduce_maximum(e, highest.get()), 16)
    total = e.variable(const(SIXTEEN, 0.0))
    with e.loop(_sixteens(e, n)) as i:
        at = e.at(scores, e.mul(i, const(I64, 64)))
        value = exp(e, e.fsub(e.load(SIXTEEN, at), top))
        e.store(value, at)
        total.set(e.fadd(total.get(), value))
    return e.sum(total.get())


def acts_stride(weight: tags.Tag, act: tags.Tag, columns: int) -> int:
    """Bytes of a row of ``columns`` values as ``to_acts`` writes it."""
    blocks = -(-columns // 32)
    return blocks * (ACT_BYTES if is_packed(weight, act) else 128)


@emitted()
def to_acts(e, weight, act, x, out, first, last):
    """Blocks ``first`` to ``last`` of a row of floats into the layout in which ``weight`` meets ``act``.

    act Q80 with Q40 or Q80 weights gives the acts of ``packed``; with F16 or F32 weights the floats are rounded as
    Q80 would and stay floats; act F32 copies.
    """
    with e.loop(e.sub(last, first)) as i:
        block = e.add(first, i)
        source = e.at(x, e.mul(block, const(I64, 128)))
        values = [e.load(SIXTEEN, source, 64 * k) for k in (0, 1)]
        target = e.at(out, e.mul(block, const(I64, 128)))
        if act is tags.Q80:
            scale, ints = _quantise(e, values)
            values = [e.fmul(e.sitofp(v, SIXTEEN), e.splat(scale, 16)) for v in ints]
        if is_packed(weight, act):
            _store_acts(e, out, block, scale, ints)
        else:
            for k, value in enumerate(values):
                e.store(value, target, 64 * k)


def _store_acts(e, out, block, scale, ints):
    target = e.at(out, e.mul(block, const(I64, ACT_BYTES)))
    for k, values in enumerate(ints):
        e.store(e.trunc(values, vec(I8, 16)), target, 16 * k)
    total = e.call("llvm.vector.reduce.add.v16i32", I32, e.add(*ints))
    e.store(scale, target, ACT_SCALE)
    e.store(e.mul(total, const(I32, -8)), target, ACT_SUM)


def _quantise(e, values):
    """Q80: the scale max|x|/127 and two vectors of int32 in -127..127, rounded to nearest even."""
    absolute = [e.call("llvm.fabs.v16f32", SIXTEEN, v) for v in values]
    largest = _reduce_maximum(e, _maximum(e, *absolute))
    scale = e.fdiv(largest, const(F32, 127.0))
    is_zero = e.fcmp_ordered("==", largest, const(F32, 0.0))
    inverse = e.select(is_zero, const(F32, 0.0), e.fdiv(const(F32, 127.0), largest))
    spread = e.splat(inverse, 16)
    rounded = [e.call("llvm.rint.v16f32", SIXTEEN, e.fmul(v, spread)) for v in values]
    return scale, [e.fptosi(r, vec(I32, 16)) for r in rounded]


@emitted()
def to_cache(e, cache, x, out, n):
    """A padded row of floats into a row of the KV cache: F32, F16 (clamped to its range) or Q80 blocks."""
    with e.loop(e.udiv(n, const(I64, 32))) as block:
        source = e.at(x, e.mul(block, const(I64, 128)))
        values = [e.load(SIXTEEN, source, 64 * k) for k in (0, 1)]
        if cache is tags.Q80:
            target = e.at(out, e.mul(block, const(I64, 34)))
            scale, ints = _quantise(e, values)
            half = ISA.float_to_half(e, _clamp(e, e.splat(scale, 16)))
            e.store(e.extract_element(half, const(I32, 0)), target)
            for k, value in enumerate(ints):
                e.store(e.trunc(value, vec(I8, 16)), target, 2 + 16 * k)
        else:
            target = e.at(out, e.mul(block, const(I64, 32 * cache.nbytes)))
            for k, value in enumerate(values):
                stored = value if cache is tags.F32 else ISA.float_to_half(e, _clamp(e, value))
                e.store(stored, target, 16 * cache.nbytes * k)


def exp(e, x):
    """eˣ of floats at most 0 or moderate, relative error below 2e-7: 2ⁿ·p(r) with r = x·log₂e - n in [-½, ½].

    p is the Taylor polynomial of 2ʳ to degree 7; 2ⁿ is built in the exponent bits, x is clamped to ±87.
    """
    x = _clamp(e, x, 87.0)
    scaled = e.fmul(x, const(SIXTEEN, 1.4426950408889634))
    whole = e.call("llvm.rint.v16f32", SIXTEEN, scaled)
    # x - n·ln2 in two parts of ln2 keeps the bits that x·log₂e - n would lose.
    r = e.fma(whole, const(SIXTEEN, -0.693145751953125), x)
    r = e.fma(whole, const(SIXTEEN, -1.428606765330187e-06), r)
    value = const(SIXTEEN, 1 / 5040)
    for coefficient in (1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2, 1.0, 1.0):
        value = e.fma(value, r, const(SIXTEEN, coefficient))
    ints = vec(I32, 16)
    bits = e.shl(e.add(e.fptosi(whole, ints), const(ints, 127)), const(ints, 23))
    return e.fmul(value, e.bitcast(bits, SIXTEEN))


def _times_sigmoid(e, x, z):
    """x / (1 + e^-z)."""
    negative = e.fneg(z)
    return e.fdiv(x, e.fadd(const(SIXTEEN, 1.0), exp(e, negative)))


def _clamp(e, x, limit=65504.0):
    low, high = const(SIXTEEN, -limit), const(SIXTEEN, limit)
    x = e.select(e.fcmp_ordered("<", x, low), low, x)
    return e.select(e.fcmp_ordered(">", x, high), high, x)


def _maximum(e, a, b):
    return e.select(e.fcmp_ordered(">", a, b), a, b)


def _reduce_maximum(e, vector):
    while vector.type.count > 1:
        half = vector.type.count // 2
        vector = _maximum(e, e.pick(vector, range(half)), e.pick(vector, range(half, 2 * half)))
    return e.extract_element(vector, const(I32, 0))


def _sixteens(e, n):
    return e.udiv(e.add(n, const(I64, 15)), const(I64, 16))
