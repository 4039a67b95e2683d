"""Rows of weights -> stored rows, Q40 with the scales of least error: what the converter writes.

A Q40 block has one free choice, its scale d; each value's code c, from -8 to 7, then is the nearest, and its error is
(x - d c)^2. The reference quantiser lets the largest value m be exactly -8 steps, d = m / -8, which serves that value
alone. Here several numbers of steps are tried. For the codes that one gives, the sum of w (x - d c)^2 is least at
d = sum(w x c) / sum(w c^2), where it is sum(w x^2) - sum(w x c)^2 / sum(w c^2): the codes with the largest last term
win, and are fitted once more. Of this scale and the reference's, each as F16 rounds it, the one with the smaller error
is written, so that no block is worse than the reference's.

w is 1, or the importance of the value's column: how large the activations are that it is multiplied with, squared.

The kernel takes LANES blocks side by side, each lane with sums of its own in a fixed order, and with no arithmetic but
that of IEEE 754, no two roundings made one: the bytes are the same on every machine, whatever the width of its vectors.
"""

import math

import numba
import numpy as np
from numba.core import config

from dllama.formats import FloatType, quantize
from dllama.formats.blocks import BLOCK, F16_MAX, Q40_BYTES
from dllama.formats.tensor import to_float32
from dllama.kernels.emit import F32, I16, I32, I64, const, emitted, vec
from dllama.kernels.jit import CACHE, ISA, KEEPS

LANES = 64
SIXTEEN = vec(F32, 16)

STEPS = np.array([6, 6.9, 7.3, 7.7, 8, 8.3, 8.6, 9], np.float32)
WEIGHTED_STEPS = np.array([6.2, 7, 7.4, 7.8, 8.2, 8.6, 9, 9.8, 11, 14], np.float32)
"""Steps from 0 to the largest value that are tried: chosen one by one as those that lessen the error most. With
importances the largest value may hardly matter, and is cut."""

FLOOR = np.float32(1e-4)
"""The least importance that a column counts with, where their mean is about 1: a text may leave some all but unused."""

NEGLIGIBLE = np.float32(2.0**-25)
"""A block of no larger values is written as zeros: F16's smallest number is twice this."""

F16_NORMAL = np.float32(2.0**-14)
F16_UNIT = np.float32(2.0**-24)
LARGEST = np.float32(F16_MAX)
LEAST_SUM = np.float32(1e-30)
ZERO, HALF, ONE, LOW, HIGH = np.float32(0), np.float32(0.5), np.float32(1), np.float32(-8), np.float32(7)

UNROLL = 2
"""Values of a block that are added to its sums while these stay in a register."""

F16, BF16 = range(2)
HALVES = {"F16": F16, "BF16": BF16}
"""Kinds of halves, numbers of two bytes, that are taken as they are."""

INFINITY, F16_INFINITY = np.float32(np.inf), np.float32(2.0**16)
"""Where the CPU does not convert halves, F16's infinities and NaN become finite numbers, from 2^16 on."""

OK, NOT_FINITE, TOO_LARGE = range(3)


def quantise(
    x: np.ndarray,
    float_type: FloatType,
    *,
    dtype: str = "F32",
    importance: np.ndarray | None = None,
    reference: bool = False,
) -> np.ndarray:
    """Store the rows of ``x`` as ``float_type``.

    x: float32 [rows, columns], or uint16 with the bits of F16 or BF16, as ``dtype`` says -> uint8 [rows,
    float_type.row_bytes(columns)]
    importance: float32 [columns], not negative: how much a squared error counts in each column; None counts all alike.
    It makes a difference for Q40 only.
    reference: write the reference quantiser's bytes, whatever the importance

    Raises ValueError where a row does not fill whole blocks, where a value is not finite, and where a value or a
    block's scale is beyond F16's largest number, 65504.
    """
    if reference or float_type is not FloatType.Q40:
        return quantize(to_float32(x, dtype).reshape(x.shape), float_type)
    rows, columns = x.shape
    out = np.empty((rows, float_type.row_bytes(columns)), np.uint8)
    blocks = np.ascontiguousarray(x).reshape(-1, BLOCK)
    half = HALVES.get(dtype)
    blocks = blocks.view(np.float32 if half is None else np.uint64)
    weights = None if importance is None else _tiles(importance, columns)
    steps = STEPS if importance is None else WEIGHTED_STEPS
    state = _search(blocks, half, weights, steps, out.reshape(-1, Q40_BYTES).view(np.uint16))
    if state == NOT_FINITE:
        raise ValueError("values that are not finite (NaN or infinity)")
    if state == TOO_LARGE:
        raise ValueError(f"a block scale beyond {F16_MAX:.0f}, which F16 cannot hold")
    return out


def _tiles(importance: np.ndarray, columns: int) -> np.ndarray:
    """The weights of LANES blocks after LANES blocks, until they repeat: float32 [tiles, 32, LANES]."""
    if importance.shape != (columns,):
        raise ValueError(f"importances {importance.shape} for rows of {columns} columns")
    # Scaled by a power of two, which rounds nothing: sums of floats are not the same on every machine.
    mean, exponent = math.frexp(importance.mean(dtype=np.float64))
    weights = np.maximum(np.ldexp(importance, -exponent), FLOOR) if mean > 0 else np.ones(columns, np.float32)
    row_blocks = columns // BLOCK
    tiles = row_blocks // math.gcd(row_blocks, LANES)
    repeated = np.resize(weights, (tiles, LANES, BLOCK))
    return np.ascontiguousarray(repeated.swapaxes(1, 2))


def _compiled(function):
    """Compiles without Python's lock and with every operation rounded on its own; kept where the kernels are."""
    before, config.CACHE_DIR = config.CACHE_DIR, str(CACHE)
    try:
        return numba.njit(function, cache=KEEPS, nogil=True, error_model="numpy")
    finally:
        config.CACHE_DIR = before


@numba.njit(inline="always")
def _code(value, inverse):
    """The nearest code, halves to even, of a value times 1 / d."""
    return min(max(np.rint(value * inverse), LOW), HIGH)


@numba.njit(inline="always")
def _to_f16(d):
    """The bits of a float32 rounded to F16, halves to even; at most 65504 from 0."""
    bits = np.float32(d).view(np.uint32)
    if abs(d) < F16_NORMAL:
        half = np.uint32(np.rint(abs(d) / F16_UNIT))
    else:
        size = bits & np.uint32(0x7FFFFFFF)
        half = ((size + np.uint32(0xFFF) + (size >> 13 & 1)) >> 13) - np.uint32(112 << 10)
    return np.uint16(half | bits >> 16 & 0x8000)


@numba.njit(inline="always")
def _from_f16(half):
    """The float32 of F16 bits, which are finite."""
    size = np.uint32(half & 0x7FFF)
    d = np.uint32((size << 13) + (112 << 23)).view(np.float32) if size >= 1024 else np.float32(size) * F16_UNIT
    return -d if half >> 15 else d


@emitted()
def _transpose(e, rows, stride, words):
    """LANES rows of 16 words of 32 bits, ``stride`` bytes apart -> ``words``, [16, LANES]: halves change places."""
    kind = vec(I32, 16)
    with e.loop(const(I64, LANES // 16)) as group:
        first = e.at(rows, e.mul(group, e.mul(stride, const(I64, 16))))
        table = []
        for _ in range(16):
            table.append(e.load(kind, first))
            first = e.at(first, stride)
        for step in (8, 4, 2, 1):
            left = [k if k & step == 0 else k + 16 - step for k in range(16)]
            for i in range(16):
                if i & step == 0:
                    a, b = table[i], table[i + step]
                    table[i], table[i + step] = e.pick(a, left, b), e.pick(a, [k + step for k in left], b)
        for i, row in enumerate(table):
            e.store(row, e.at(words, e.at(e.mul(group, const(I64, 4 * 16)), 4 * LANES * i)))


@_compiled
def _search(x, half, weights, steps, out):
    """x: float32 [blocks, 32], or uint64 [blocks, 8] of four halves each;  half: an entry of HALVES, or None;
    weights: float32 [tiles, 32, LANES], or None;  out: uint16 [blocks, 9];  returns OK, or why nothing is written."""
    v, pairs = np.empty((BLOCK, LANES), np.float32), np.empty((BLOCK // 2, LANES), np.uint32)
    last = np.zeros((LANES, x.shape[1]), x.dtype)
    largest, unit, scale = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    packed = np.empty((Q40_BYTES // 2, LANES), np.uint16)
    for first in range(0, len(x), LANES):
        w = None if weights is None else weights[first // LANES % len(weights)]
        count = min(LANES, len(x) - first)
        if count < LANES:
            last[:count] = x[first:]
        blocks = x[first:].ctypes.data if count == LANES else last.ctypes.data
        if half is None:
            for k in range(2):
                _transpose(blocks + 64 * k, 4 * BLOCK, v[BLOCK // 2 * k :].ctypes.data)
        else:
            _transpose(blocks, 2 * BLOCK, pairs.ctypes.data)
            if half == F16:
                _widen_f16(pairs.ctypes.data, v.ctypes.data)
            else:
                _widen_bf16(pairs.ctypes.data, v.ctypes.data)
        state = _normalise(v, F16_INFINITY if half == F16 else INFINITY, largest, unit)
        if state != OK:
            return state
        _fit(v, w, steps, scale)
        _pack(v, w, largest, unit, scale, packed)
        for lane in range(count):
            for j in range(Q40_BYTES // 2):
                out[first + lane, j] = packed[j, lane]
    return OK


def _widening(widen):
    """A function that makes numbers of halves: addresses of ``pairs``, uint32 [16, LANES], each a half in its lower
    bits and the next one in its upper, and of v, float32 [32, LANES].

    widen: int16 lanes with the bits of halves -> float32 lanes
    """

    @emitted()
    def widened(e, pairs, v):
        with e.loop(const(I64, LANES // 16)) as group:
            at = e.mul(group, const(I64, 4 * 16))
            for j in range(BLOCK // 2):
                pair = e.load(vec(I32, 16), e.at(pairs, e.at(at, 4 * LANES * j)))
                for k, bits in enumerate((pair, e.lshr(pair, const(vec(I32, 16), 16)))):
                    e.store(widen(e, e.trunc(bits, vec(I16, 16))), e.at(v, e.at(at, 4 * LANES * (2 * j + k))))

    return widened


def _bf16(e, bits):
    return e.bitcast(e.shl(e.zext(bits, vec(I32, 16)), const(vec(I32, 16), 16)), SIXTEEN)


_widen_f16, _widen_bf16 = _widening(ISA.half_to_float), _widening(_bf16)


@_compiled
def _normalise(v, infinity, largest, unit):
    """Divides each block by its largest value, so that the search meets nothing beyond 1.

    v: float32 [32, LANES], in and out;  largest, unit: float32 [LANES], the value of largest magnitude with its sign,
    and what the others were multiplied by;  infinity: from here on a number is not finite
    """
    check = np.zeros(LANES, np.float32)
    largest[:] = ZERO
    for i in range(0, BLOCK, UNROLL):
        for lane in range(LANES):
            m, wrong = largest[lane], check[lane]
            for k in range(UNROLL):
                value = v[i + k, lane]
                wrong += value * ZERO  # NaN where the value is not finite
                m = value if abs(value) > abs(m) else m
            largest[lane], check[lane] = m, wrong
    for lane in range(LANES):
        if check[lane] != ZERO or abs(largest[lane]) >= infinity:
            return NOT_FINITE
        if abs(largest[lane]) > -LOW * LARGEST:
            return TOO_LARGE
        unit[lane] = ONE / largest[lane] if abs(largest[lane]) > NEGLIGIBLE else ZERO
    for j in range(BLOCK):
        for lane in range(LANES):
            v[j, lane] *= unit[lane]
    return OK


def _summing(low, high, weighted):
    """A function that sums w x c and w c^2 of each block: addresses of v, w, inverse, xc and cc, float32 [.., LANES].

    low, high: the bounds of the codes, None where no value is beyond them;  weighted: whether there are weights
    """

    @emitted()
    def sums(e, v, w, inverse, xc, cc):
        with e.loop(const(I64, LANES // 16)) as group:
            at = e.mul(group, const(I64, 4 * 16))
            steps = e.load(SIXTEEN, e.at(inverse, at))
            sum_xc = sum_cc = const(SIXTEEN, 0.0)
            for j in range(BLOCK):
                place = e.at(at, 4 * LANES * j)
                x = e.load(SIXTEEN, e.at(v, place))
                c = e.call("llvm.rint.v16f32", SIXTEEN, e.fmul(x, steps))
                if low is not None:
                    bound = const(SIXTEEN, float(low))
                    c = e.select(e.fcmp_ordered(">", c, bound), c, bound)
                if high is not None:
                    bound = const(SIXTEEN, float(high))
                    c = e.select(e.fcmp_ordered("<", c, bound), c, bound)
                wc = e.fmul(e.load(SIXTEEN, e.at(w, place)), c) if weighted else c
                sum_xc = e.fadd(sum_xc, e.fmul(wc, x))
                sum_cc = e.fadd(sum_cc, e.fmul(wc, c))
            e.store(sum_xc, e.at(xc, at))
            e.store(sum_cc, e.at(cc, at))

    return sums


_sums, _sums_below, _sums_between = (_summing(*bounds, False) for bounds in ((None, None), (None, HIGH), (LOW, HIGH)))
_weighted, _weighted_below, _weighted_between = (
    _summing(*bounds, True) for bounds in ((None, None), (None, HIGH), (LOW, HIGH))
)


@_compiled
def _fit(v, w, steps, scale):
    """The scale of least error of each block of values v, weights w (float32 [32, LANES]) -> scale, float32 [LANES]."""
    inverse, most = np.empty(LANES, np.float32), np.full(LANES, -ONE)
    sums = np.empty((2, LANES), np.float32)
    for n in range(len(steps) + 1):
        if n < len(steps):
            inverse[:] = -steps[n]
        else:
            for lane in range(LANES):  # once more from the best
                inverse[lane] = ONE / scale[lane] if scale[lane] != ZERO else ZERO
        at, tried, to = v.ctypes.data, inverse.ctypes.data, sums.ctypes.data
        if w is None:
            if n == len(steps) or steps[n] > -LOW + HALF:
                _sums_between(at, 0, tried, to, to + 4 * LANES)
            elif steps[n] >= HIGH + HALF:
                _sums_below(at, 0, tried, to, to + 4 * LANES)
            else:
                _sums(at, 0, tried, to, to + 4 * LANES)
        elif n == len(steps) or steps[n] > -LOW + HALF:
            _weighted_between(at, w.ctypes.data, tried, to, to + 4 * LANES)
        elif steps[n] >= HIGH + HALF:
            _weighted_below(at, w.ctypes.data, tried, to, to + 4 * LANES)
        else:
            _weighted(at, w.ctypes.data, tried, to, to + 4 * LANES)
        for lane in range(LANES):
            fitted = sums[0, lane] / max(sums[1, lane], LEAST_SUM)
            gain = fitted * sums[0, lane]
            scale[lane] = fitted if gain > most[lane] else scale[lane]
            most[lane] = max(gain, most[lane])


@_compiled
def _pack(v, w, largest, unit, scale, packed):
    """Blocks with the fitted scale or the reference's, whichever errs less -> packed, uint16 [9, LANES]."""
    halves, inverse = np.empty((2, LANES), np.uint16), np.empty((2, LANES), np.float32)
    d, error = np.empty((2, LANES), np.float32), np.zeros((2, LANES), np.float32)
    for lane in range(LANES):
        halves[0, lane] = _to_f16(largest[lane] / LOW)
        halves[1, lane] = _to_f16(min(max(scale[lane] * largest[lane], -LARGEST), LARGEST))
    for n in range(2):
        for lane in range(LANES):
            d[n, lane] = _from_f16(halves[n, lane]) * unit[lane]
            inverse[n, lane] = ONE / d[n, lane] if d[n, lane] != ZERO else ZERO
        for i in range(0, BLOCK, UNROLL):
            for lane in range(LANES):
                total = error[n, lane]
                for k in range(UNROLL):
                    rest = v[i + k, lane] - d[n, lane] * _code(v[i + k, lane], inverse[n, lane])
                    total += rest * rest if w is None else w[i + k, lane] * (rest * rest)
                error[n, lane] = total
    for lane in range(LANES):
        best = 1 if error[1, lane] < error[0, lane] else 0
        packed[0, lane] = halves[best, lane]
        inverse[0, lane] = inverse[best, lane]
    for j in range(0, BLOCK // 2, 2):
        for lane in range(LANES):
            both = np.int32(0)
            for k in range(2):
                low = np.int32(_code(v[j + k, lane], inverse[0, lane])) + 8
                high = np.int32(_code(v[j + k + BLOCK // 2, lane], inverse[0, lane])) + 8
                both |= (low | high << 4) << 8 * k
            packed[1 + j // 2, lane] = both
