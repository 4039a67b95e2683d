"""Rows of numbers as bytes: plain F32 and F16, and the quantised blocks Q40 and Q80.

A quantised row is a sequence of blocks of 32 consecutive values, so its length is a multiple of 32::

    Q40  18 bytes: f16 d, then 16 bytes; byte j holds value j (low nibble) and value j+16 (high nibble);
         value = (q - 8) * d with q in 0..15           (GGUF calls it Q4_0)
    Q80  34 bytes: f16 d, then 32 int8;
         value = q * d                                 (GGUF calls it Q8_0)

Everything is little-endian.
"""

import enum

import numpy as np

BLOCK = 32
Q40_BYTES = 2 + BLOCK // 2
Q80_BYTES = 2 + BLOCK
F16_MAX = 65504.0

# Blocks handled at a time: the temporaries of one step (a few 4-byte copies of 32 * STEP values) stay in the L2 cache.
STEP = 2048


class FloatType(enum.IntEnum):
    """How the numbers of a matrix are stored. The values are those of the `.m` header."""

    F32 = 0
    F16 = 1
    Q40 = 2
    Q80 = 3

    @classmethod
    def parse(cls, text: str) -> "FloatType":
        """The type named by ``text`` ("f32", "f16", "q40", "q80", any case); ValueError if there is none."""
        try:
            return cls[text.upper()]
        except KeyError:
            known = ", ".join(member.name.lower() for member in cls)
            raise ValueError(f"unknown float type {text!r} (known: {known})") from None

    @property
    def is_quantized(self) -> bool:
        """Whether rows are made of blocks of 32 values."""
        return self in (FloatType.Q40, FloatType.Q80)

    def row_bytes(self, n: int) -> int:
        """Bytes of one row of ``n`` values; ValueError where ``n`` does not fill whole blocks."""
        if self is FloatType.F32:
            return 4 * n
        if self is FloatType.F16:
            return 2 * n
        if n % BLOCK:
            raise ValueError(f"a {self.name} row holds blocks of {BLOCK} values, and {n} is not a multiple of {BLOCK}")
        return n // BLOCK * (Q40_BYTES if self is FloatType.Q40 else Q80_BYTES)


def quantize(x: np.ndarray, float_type: FloatType) -> np.ndarray:
    """Store the rows of ``x`` as ``float_type``.

    x: float32 [rows, n] -> uint8 [rows, float_type.row_bytes(n)]

    Raises ValueError where ``n`` does not fill whole blocks, where a value is not finite, and where a value or a
    block's scale is beyond F16's largest number, 65504.
    """
    x = np.ascontiguousarray(x, dtype="<f4")
    rows, n = x.shape
    out = np.empty((rows, float_type.row_bytes(n)), dtype=np.uint8)
    if not float_type.is_quantized:
        _check_finite(x)
        if float_type is FloatType.F16 and x.size and np.abs(x).max() > F16_MAX:
            raise ValueError(f"values beyond {F16_MAX:.0f}, which F16 cannot hold")
        out.view("<f4" if float_type is FloatType.F32 else "<f2")[...] = x
        return out
    block_bytes, pack = (Q40_BYTES, _pack_q40) if float_type is FloatType.Q40 else (Q80_BYTES, _pack_q80)
    blocks, packed = x.reshape(-1, BLOCK), out.reshape(-1, block_bytes)
    with np.errstate(invalid="ignore"):  # NaN is found, and raised as an error of its own
        for start in range(0, len(blocks), STEP):
            pack(blocks[start : start + STEP], packed[start : start + STEP])
    return out


def dequantize(raw: np.ndarray, float_type: FloatType, n: int) -> np.ndarray:
    """The numbers that ``raw`` stores, as a new array.

    raw: uint8 [rows, float_type.row_bytes(n)] -> float32 [rows, n]
    """
    rows, row_bytes = raw.shape
    if row_bytes != float_type.row_bytes(n):
        raise ValueError(f"a {float_type.name} row of {n} values has {float_type.row_bytes(n)} bytes, not {row_bytes}")
    raw = np.ascontiguousarray(raw)
    if not float_type.is_quantized:
        return raw.view("<f4" if float_type is FloatType.F32 else "<f2").astype(np.float32)
    out = np.empty((rows, n), dtype=np.float32)
    block_bytes, unpack = (Q40_BYTES, _unpack_q40) if float_type is FloatType.Q40 else (Q80_BYTES, _unpack_q80)
    packed, blocks = raw.reshape(-1, block_bytes), out.reshape(-1, BLOCK)
    with np.errstate(invalid="ignore"):  # 0 times an infinite scale is no number; who reads the values checks them
        for start in range(0, len(blocks), STEP):
            unpack(packed[start : start + STEP], blocks[start : start + STEP])
    return out


# The quantisers work on transposed blocks, [32, blocks]: numpy's loops then run over thousands of blocks at a time
# instead of over the 32 values of one.


def _pack_q40(x: np.ndarray, out: np.ndarray) -> None:
    """d = m / -8 with m the (first) value of largest magnitude; q = clip(trunc(x / d + 8.5), 0, 15)."""
    x = np.array(x.T, order="C")
    d = _checked_scale(_largest(x) / np.float32(-8))
    q = np.divide(x, _divisor(d), out=x)
    q += np.float32(8.5)
    q = np.minimum(q, 15, out=q).astype(np.uint8)  # q is never below 0.5, since |x / d| <= 8
    _store_q40(out, d, q)


def _pack_q80(x: np.ndarray, out: np.ndarray) -> None:
    """d = max|x| / 127; q = round(x / d), halves to even."""
    x = np.array(x.T, order="C")
    d = _checked_scale(np.abs(x).max(axis=0) / np.float32(127))
    q = np.divide(x, _divisor(d), out=x)
    _store_scale(out, d)
    out[:, 2:].view(np.int8)[...] = np.rint(q, out=q).astype(np.int8).T


def _unpack_q40(raw: np.ndarray, out: np.ndarray) -> None:
    d, q = _load_scale(raw), raw[:, 2:]
    np.subtract(q & 15, np.float32(8), out=out[:, :16])
    np.subtract(q >> 4, np.float32(8), out=out[:, 16:])
    out *= d


def _unpack_q80(raw: np.ndarray, out: np.ndarray) -> None:
    np.multiply(raw[:, 2:].view(np.int8), _load_scale(raw), out=out)


def _largest(x: np.ndarray) -> np.ndarray:
    """The value of largest magnitude in each column, with its sign; the first where several are."""
    low, high = x.min(axis=0), x.max(axis=0)
    m = np.where(-low > high, low, high)
    tied = np.flatnonzero(-low == high)
    if tied.size:
        m[tied] = x[np.abs(x[:, tied]).argmax(axis=0), tied]
    return m + np.float32(0)  # +0 for a block of zeros, whatever their signs


def _checked_scale(d: np.ndarray) -> np.ndarray:
    """The scales ``d``, or ValueError where one cannot be written."""
    _check_finite(d)
    if d.size and np.abs(d).max() > F16_MAX:
        raise ValueError(f"a block scale beyond {F16_MAX:.0f}, which F16 cannot hold")
    return d


def _check_finite(x: np.ndarray) -> None:
    if not np.isfinite(x).all():
        raise ValueError("values that are not finite (NaN or infinity)")


def _divisor(d: np.ndarray) -> np.ndarray:
    """d, and 1 for the blocks of zeros."""
    return np.where(d == 0, np.float32(1), d)


def _store_q40(blocks: np.ndarray, d: np.ndarray, q: np.ndarray) -> None:
    """d: float32 [blocks];  q: uint8 [32, blocks]"""
    _store_scale(blocks, d)
    blocks[:, 2:] = (q[:16] | q[16:] << 4).T


def _store_scale(blocks: np.ndarray, d: np.ndarray) -> None:
    blocks[:, :2] = d.astype("<f2").view(np.uint8).reshape(-1, 2)


def _load_scale(blocks: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float32)
