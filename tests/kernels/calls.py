"""The kernels as functions of arrays: what the tests call, and the one place that knows the kernels' own signatures.

Every array that a kernel writes to lies between two guards, and writing outside it is an error.
"""

from contextlib import contextmanager

import numpy as np

from dllama.formats import FloatType, dequantize, quantize
from dllama.kernels import attention, dot, elementwise, packed, tags
from dllama.kernels.emit import F32, I16, I64, const, emitted, vec
from dllama.kernels.jit import ISA, jit
from dllama.kernels.team import Team

GUARD = 256
FILL = 0xA5


@contextmanager
def room(nbytes: int, misaligned: int = 0):
    """uint8 [nbytes] to be written, zeroed, ``misaligned`` bytes off a boundary of 64; its guards are checked."""
    memory = np.full(nbytes + 2 * GUARD + 128, FILL, np.uint8)
    start = GUARD + -(memory.ctypes.data + GUARD) % 64 + misaligned
    memory[start : start + nbytes] = 0
    yield memory[start : start + nbytes]
    assert (memory[:start] == FILL).all(), "written before its room"
    assert (memory[start + nbytes :] == FILL).all(), "written past its room"


def padded(n: int, multiple: int = 32) -> int:
    return -(-n // multiple) * multiple


def pad(x) -> np.ndarray:
    """Rows of float32, padded with zeros to a multiple of 32 values."""
    x = np.atleast_2d(np.asarray(x, np.float32))
    out = np.zeros((len(x), padded(x.shape[1])), np.float32)
    out[:, : x.shape[1]] = x
    return out


def float_type(tag: tags.Tag) -> FloatType:
    return FloatType.parse(tag.name)


# Numba functions around the emitted ones, which only compiled code can call.


@jit
def _rms_norm(x, weight, out, n, epsilon):
    elementwise.rms_norm(x, weight, out, n, epsilon)


@jit
def _silu_times(gate, up, n):
    elementwise.silu_times(gate, up, n)


@jit
def _gelu_times(gate, up, n):
    elementwise.gelu_times(gate, up, n)


@jit
def _add(x, y, n):
    elementwise.add(x, y, n)


@jit
def _add_summands(form, x, x_stride, y, y_stride, factors, factors_stride, n, rows):
    if rows == 1:
        elementwise.add_summands(form, x, x_stride, y, y_stride, factors, factors_stride, n)
    else:
        elementwise.add_summands_to_two(form, x, x_stride, y, y_stride, factors, factors_stride, n)


@jit
def _softmax(scores, n):
    return elementwise.softmax(scores, n)


@jit
def _to_acts(weight, act, x, out, first, last):
    elementwise.to_acts(weight, act, x, out, first, last)


@jit
def _to_cache(cache, x, out, n):
    elementwise.to_cache(cache, x, out, n)


@emitted()
def _exp_16(e, x, out):
    e.store(elementwise.exp(e, e.load(elementwise.SIXTEEN, x)), out)


@jit
def _exp(x, out, n):
    for i in range(0, 4 * n, 64):
        _exp_16(x + i, out + i)


@emitted()
def _widen(e, width, halves, floats, index):
    half = e.load(vec(I16, width.block), halves, e.mul(index, const(I64, 2 * width.block)))
    e.store(ISA.half_to_float(e, half), floats, e.mul(index, const(I64, 4 * width.block)))


@emitted()
def _narrow(e, width, floats, halves, index):
    value = e.load(vec(F32, width.block), floats, e.mul(index, const(I64, 4 * width.block)))
    e.store(ISA.float_to_half(e, value), halves, e.mul(index, const(I64, 2 * width.block)))


@jit
def _half_to_float(width, source, target, count):
    for i in range(count):
        _widen(width, source, target, i)


@jit
def _float_to_half(width, source, target, count):
    for i in range(count):
        _narrow(width, source, target, i)


WIDTHS = [tags.Tag(f"{lanes} lanes", lanes, 2 * lanes) for lanes in sorted({packed.LANES, 16})]
"""How many halves are converted at a time: by the packed product, and by everything else."""


def half_to_float(width: tags.Tag, half: np.ndarray) -> np.ndarray:
    """float16 [n] → float32 [n]; n a multiple of 16."""
    with room(4 * len(half)) as out:
        _half_to_float(width, half.ctypes.data, out.ctypes.data, len(half) // width.block)
    return out.view(np.float32)


def float_to_half(width: tags.Tag, values: np.ndarray) -> np.ndarray:
    """float32 [n] → float16 [n]; n a multiple of 16."""
    with room(2 * len(values)) as out:
        _float_to_half(width, values.ctypes.data, out.ctypes.data, len(values) // width.block)
    return out.view(np.float16)


def exp(x: np.ndarray) -> np.ndarray:
    """float32 [n], n a multiple of 16."""
    with room(x.nbytes) as out:
        _exp(x.ctypes.data, out.ctypes.data, len(x))
    return out.view(np.float32)


def rms_norm(x: np.ndarray, weight: np.ndarray, epsilon: float) -> np.ndarray:
    rows, weights = pad(x), pad(weight)
    with room(rows.nbytes, misaligned=4) as out:
        _rms_norm(rows.ctypes.data, weights.ctypes.data, out.ctypes.data, x.size, epsilon)
    return out.view(np.float32)


def in_place(function, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """One of add, silu_times and gelu_times, which change their first argument; the result with its padding."""
    rows, others = pad(x), pad(y)
    with room(rows.nbytes, misaligned=8) as out:
        out.view(np.float32)[:] = rows[0]
        function(out.ctypes.data, others.ctypes.data, x.size)
    return out.view(np.float32)


def add_summands(form: tags.Tag, x, y, factors) -> np.ndarray:
    """x [rows, n] + factors [rows, summands]·y [summands, n], for one row or two."""
    rows, n = x.shape
    padded_y = pad(y).astype(np.float32 if form is tags.F32 else np.float16)
    with room(pad(x).nbytes) as out:
        found = out.view(np.float32).reshape(rows, -1)
        found[:] = pad(x)
        _add_summands(
            form, found.ctypes.data, found.strides[0], padded_y.ctypes.data, padded_y.strides[0],
            factors.ctypes.data, factors.strides[0], n, rows,
        )  # fmt: skip
    return found[:, :n]


def add(x, y):
    return in_place(_add, x, y)


def silu_times(gate, up):
    return in_place(_silu_times, gate, up)


def gelu_times(gate, up):
    return in_place(_gelu_times, gate, up)


def softmax(scores: np.ndarray) -> tuple[np.ndarray, float]:
    """exp(scores - max), and their sum."""
    with room(4 * padded(len(scores), 16), misaligned=4) as out:
        values = out.view(np.float32)
        values[:] = np.nan
        values[: len(scores)] = scores
        total = _softmax(out.ctypes.data, len(scores))
    return values[: len(scores)], total


def to_acts(weight: tags.Tag, act: tags.Tag, x: np.ndarray, parts: int = 1) -> np.ndarray:
    """Rows as the products take them, uint8 [tokens, stride]; converted in ``parts`` steps of some blocks each."""
    rows = pad(x)
    blocks, stride = rows.shape[1] // 32, elementwise.acts_stride(weight, act, x.shape[1])
    with room(len(rows) * stride) as out:
        for i, row in enumerate(rows):
            for part in range(parts):
                first, last = blocks * part // parts, blocks * (part + 1) // parts
                _to_acts(weight, act, row.ctypes.data, out.ctypes.data + i * stride, first, last)
    return out.reshape(len(rows), stride)


def act_blocks(acts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Packed acts [tokens, stride] → int8 [tokens, blocks, 32], scales float32 and sums int32 [tokens, blocks]."""
    blocks = acts.reshape(len(acts), -1, packed.ACT_BYTES)
    scales, sums = blocks[..., packed.ACT_SCALE :][..., :4], blocks[..., packed.ACT_SUM :][..., :4]
    return (
        blocks[..., :32].view(np.int8),
        np.ascontiguousarray(scales).view(np.float32)[..., 0],
        np.ascontiguousarray(sums).view(np.int32)[..., 0],
    )


def acts_of(ints: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The opposite of ``act_blocks``: any int8 [tokens, blocks, 32] and float32 [tokens, blocks] as packed acts."""
    out = np.zeros((*scales.shape, packed.ACT_BYTES), np.uint8)
    out[..., :32] = ints.view(np.uint8)
    out[..., packed.ACT_SCALE : packed.ACT_SUM] = scales.astype("<f4")[..., None].view(np.uint8)
    sums = -8 * ints.astype(np.int32).sum(-1)
    out[..., packed.ACT_SUM :] = sums.astype("<i4")[..., None].view(np.uint8)
    return out.reshape(len(ints), -1)


def multiply_packed(team: Team, weight: tags.Tag, raw: np.ndarray, columns: int, acts: np.ndarray) -> np.ndarray:
    """Stored blocks [rows, row_bytes] are packed by a team and multiplied with packed acts: float32 [tokens, rows]."""
    rows, tokens = len(raw), len(acts)
    groups, tiles = padded(rows, packed.ROWS) // packed.ROWS, padded(tokens, packed.TOKENS)
    tiled = np.zeros((tiles, acts.shape[1]), np.uint8)
    tiled[:tokens] = acts
    stride = 4 * groups * packed.ROWS
    with room(packed.packed_bytes(weight, rows, columns)) as target, room(tiles * stride) as out:
        team.run(packed.pack, team.sync, weight, raw.ctypes.data, raw.strides[0], rows, columns, target.ctypes.data)
        packed.multiply_packed(
            weight, target.ctypes.data, groups, columns, tiled.ctypes.data, tiled.strides[0], tokens,
            out.ctypes.data, stride,
        )  # fmt: skip
    result = out.view(np.float32).reshape(tiles, -1)
    assert not result[:tokens, rows:].any(), "rows of padding give zeros"
    return result[:tokens, :rows]


def multiply_rows(weight: tags.Tag, raw: np.ndarray, columns: int, x: np.ndarray) -> np.ndarray:
    """Stored rows [rows, row_bytes], any stride, times rows of floats [tokens, columns]: float32 [tokens, rows]."""
    rows, tokens = len(raw), len(x)
    tiles = padded(tokens, dot.TOKENS) if tokens > 1 else 1
    tiled = np.zeros((tiles, padded(columns)), np.float32)
    tiled[:tokens] = pad(x)
    with room(tiles * 4 * rows, misaligned=4) as out:
        dot.multiply_rows(
            weight, raw.ctypes.data, raw.strides[0], rows, columns, tiled.ctypes.data, tiled.strides[0], tokens,
            out.ctypes.data, 4 * rows,
        )  # fmt: skip
    return out.view(np.float32).reshape(tiles, rows)[:tokens]


def to_cache(cache: tags.Tag, x: np.ndarray) -> np.ndarray:
    """Rows [positions, head_dim] as the KV cache holds them: uint8 [positions, cache_row_bytes]."""
    rows, nbytes = pad(x), attention.cache_row_bytes(cache, x.shape[1])
    with room(len(rows) * nbytes) as out:
        for i, row in enumerate(rows):
            _to_cache(cache, row.ctypes.data, out.ctypes.data + i * nbytes, rows.shape[1])
    return out.reshape(len(rows), nbytes)


def from_cache(cache: tags.Tag, rows: np.ndarray, head_dim: int) -> np.ndarray:
    """The float32 values of cache rows."""
    return dequantize(rows, float_type(cache), padded(head_dim))[:, :head_dim]


def attend(cache: tags.Tag, queries: np.ndarray, keys: np.ndarray, values: np.ndarray, head_dim: int) -> np.ndarray:
    """Attention of queries [heads, head_dim], heads 1 or HEADS, over cache rows: float32 [heads, head_dim]."""
    rows = pad(queries)
    heads, positions = len(queries), len(keys)
    scores_stride = padded(4 * (positions + 16), 64)
    with room(rows.nbytes) as out, room(attention.HEADS * scores_stride + 4 * attention.HEADS) as scores:
        attention.attend(
            cache, rows.ctypes.data, rows.strides[0], heads, keys.ctypes.data, values.ctypes.data, keys.strides[0],
            positions, head_dim, scores.ctypes.data, scores_stride, out.ctypes.data,
        )  # fmt: skip
    return out.view(np.float32).reshape(heads, -1)[:, :head_dim]


def stored(tag: tags.Tag, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """float32 [rows, n] as the bytes of a model file, and the float64 values that these stand for."""
    raw = quantize(values, float_type(tag))
    return raw, dequantize(raw, float_type(tag), values.shape[1]).astype(np.float64)
