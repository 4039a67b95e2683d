"""Rows of weights -> stored rows, Q40 with the scales of least error: what the converter writes.

A Q40 block has one free choice, its scale d; each value's code c, from -8 to 7, then is the nearest, and its error is
(x - d c)^2. The reference quantiser lets the largest value m be exactly -8 steps, d = m / -8, which serves that value
alone. Here several numbers of steps are tried. For the codes that one gives, the sum of w (x - d c)^2 is least at
d = sum(w x c) / sum(w c^2), where it is sum(w x^2) - sum(w x c)^2 / sum(w c^2): the codes with the largest last term
win, and are fitted once more. Of this scale and the reference's, each as F16 rounds it, the one with the smaller error
is written, so that no block is worse than the reference's.

w is 1, or the importance of the value's column: how large the activations are that it is multiplied with, squared.

The kernel takes LANES blocks side by side, each lane with sums of its own in a fixed order, and with no arithmetic but
that of IEEE 754: the bytes are the same on every machine, whatever the width of its vectors.
"""

import math

import numba
import numpy as np
from numba.core import config

from dllama.formats import FloatType, quantize
from dllama.formats.blocks import BLOCK, F16_MAX, Q40_BYTES
from dllama.kernels.jit import CACHE, KEEPS

LANES = 64

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
ZERO, ONE, LOW, HIGH = np.float32(0), np.float32(1), np.float32(-8), np.float32(7)

OK, NOT_FINITE, TOO_LARGE = range(3)


def quantise(
    x: np.ndarray, float_type: FloatType, *, importance: np.ndarray | None = None, reference: bool = False
) -> np.ndarray:
    """Store the rows of ``x`` as ``float_type``.

    x: float32 [rows, columns] -> uint8 [rows, float_type.row_bytes(columns)]
    importance: float32 [columns], not negative: how much a squared error counts in each column; None counts all alike.
    It makes a difference for Q40 only.
    reference: write the reference quantiser's bytes, whatever the importance

    Raises ValueError where a row does not fill whole blocks, where a value is not finite, and where a value or a
    block's scale is beyond F16's largest number, 65504.
    """
    if reference or float_type is not FloatType.Q40:
        return quantize(x, float_type)
    rows, columns = x.shape
    out = np.empty((rows, float_type.row_bytes(columns)), np.uint8)
    blocks = np.ascontiguousarray(x, np.float32).reshape(-1, BLOCK)
    if importance is None:
        weights, steps = np.ones((1, BLOCK, LANES), np.float32), STEPS
    else:
        weights, steps = _tiles(importance, columns), WEIGHTED_STEPS
    state = _search(blocks, weights, steps, out.reshape(-1, Q40_BYTES))
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


@_compiled
def _search(x, weights, steps, out):
    """x: float32 [blocks, 32];  out: uint8 [blocks, 18];  returns OK, or why there is nothing to write."""
    v = np.empty((BLOCK, LANES), np.float32)
    largest, unit, scale = np.empty(LANES, np.float32), np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    packed = np.empty((Q40_BYTES, LANES), np.uint8)
    for first in range(0, len(x), LANES):
        w = weights[first // LANES % len(weights)]
        count = min(LANES, len(x) - first)
        v[:] = ZERO
        for lane in range(count):
            for j in range(BLOCK):
                v[j, lane] = x[first + lane, j]
        state = _normalise(v, largest, unit)
        if state != OK:
            return state
        _fit(v, w, steps, scale)
        _pack(v, w, largest, unit, scale, packed)
        for lane in range(count):
            for j in range(Q40_BYTES):
                out[first + lane, j] = packed[j, lane]
    return OK


@_compiled
def _normalise(v, largest, unit):
    """Divides each block by its largest value, so that the search meets nothing beyond 1.

    v: float32 [32, LANES], in and out;  largest, unit: float32 [LANES], the value of largest magnitude with its sign,
    and what the others were multiplied by
    """
    check = np.zeros(LANES, np.float32)
    largest[:] = ZERO
    for j in range(BLOCK):
        for lane in range(LANES):
            value = v[j, lane]
            check[lane] += value * ZERO  # NaN where the value is not finite
            largest[lane] = value if abs(value) > abs(largest[lane]) else largest[lane]
    for lane in range(LANES):
        if check[lane] != ZERO:
            return NOT_FINITE
        if abs(largest[lane]) > -LOW * LARGEST:
            return TOO_LARGE
        unit[lane] = ONE / largest[lane] if abs(largest[lane]) > NEGLIGIBLE else ZERO
    for j in range(BLOCK):
        for lane in range(LANES):
            v[j, lane] *= unit[lane]
    return OK


@_compiled
def _fit(v, w, steps, scale):
    """The scale of least error of each block of values v, weights w (float32 [32, LANES]) -> scale, float32 [LANES]."""
    inverse, most = np.empty(LANES, np.float32), np.full(LANES, -ONE)
    xc, cc = np.empty(LANES, np.float32), np.empty(LANES, np.float32)
    for n in range(len(steps) + 1):
        if n < len(steps):
            inverse[:] = -steps[n]
        else:
            for lane in range(LANES):  # once more from the best
                inverse[lane] = ONE / scale[lane] if scale[lane] != ZERO else ZERO
        xc[:] = ZERO
        cc[:] = ZERO
        for j in range(BLOCK):
            for lane in range(LANES):
                c = _code(v[j, lane], inverse[lane])
                wc = w[j, lane] * c
                xc[lane] += wc * v[j, lane]
                cc[lane] += wc * c
        for lane in range(LANES):
            fitted = xc[lane] / max(cc[lane], LEAST_SUM)
            gain = fitted * xc[lane]
            scale[lane] = fitted if gain > most[lane] else scale[lane]
            most[lane] = max(gain, most[lane])


@_compiled
def _pack(v, w, largest, unit, scale, packed):
    """Blocks with the fitted scale or the reference's, whichever errs less -> packed, uint8 [18, LANES]."""
    halves, inverse = np.empty((2, LANES), np.uint16), np.empty((2, LANES), np.float32)
    d, error = np.empty((2, LANES), np.float32), np.zeros((2, LANES), np.float32)
    for lane in range(LANES):
        halves[0, lane] = _to_f16(largest[lane] / LOW)
        halves[1, lane] = _to_f16(min(max(scale[lane] * largest[lane], -LARGEST), LARGEST))
    for k in range(2):
        for lane in range(LANES):
            d[k, lane] = _from_f16(halves[k, lane]) * unit[lane]
            inverse[k, lane] = ONE / d[k, lane] if d[k, lane] != ZERO else ZERO
        for j in range(BLOCK):
            for lane in range(LANES):
                rest = v[j, lane] - d[k, lane] * _code(v[j, lane], inverse[k, lane])
                error[k, lane] += w[j, lane] * (rest * rest)
    for lane in range(LANES):
        best = 1 if error[1, lane] < error[0, lane] else 0
        packed[0, lane], packed[1, lane] = halves[best, lane] & 255, halves[best, lane] >> 8
        inverse[0, lane] = inverse[best, lane]
    for j in range(BLOCK // 2):
        for lane in range(LANES):
            low = np.int32(_code(v[j, lane], inverse[0, lane])) + 8
            high = np.int32(_code(v[j + BLOCK // 2, lane], inverse[0, lane])) + 8
            packed[2 + j, lane] = low | high << 4
