import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dllama.formats import FloatType, dequantize, quantize

F32 = np.float32


def scalar_q40(values) -> bytes:
    """One block by the formula, a value at a time."""
    m = F32(0)
    for value in values:
        if abs(value) > abs(m):
            m = value
    d = m / F32(-8)
    q = [min(15, max(0, int(x / d + F32(8.5)))) if d else 8 for x in values]
    return struct.pack("<e", d) + bytes(q[j] | q[j + 16] << 4 for j in range(16))


def scalar_q80(values) -> bytes:
    d = max(abs(value) for value in values) / F32(127)
    return struct.pack("<e", d) + struct.pack("<32b", *(round(float(x / d)) if d else 0 for x in values))


rows = hnp.arrays(
    np.float32,
    st.tuples(st.integers(1, 3), st.sampled_from([32, 64, 96])),
    elements=st.one_of(
        st.floats(-1000, 1000, width=32),
        st.sampled_from([0.0, -0.0, 1.0, -1.0, 1e-30, -1e-42]).map(lambda v: float(F32(v))),
        st.floats(-(2.0**-20), 2.0**-20, width=32),
    ),
)


@pytest.mark.parametrize("float_type, scalar", [(FloatType.Q40, scalar_q40), (FloatType.Q80, scalar_q80)])
@given(x=rows)
def test_blocks_are_the_formula_to_the_byte(float_type, scalar, x):
    expected = [b"".join(scalar(block) for block in row.reshape(-1, 32)) for row in x]
    before = x.copy()
    assert [row.tobytes() for row in quantize(x, float_type)] == expected
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("float_type", FloatType)
def test_many_rows_cross_steps_and_round_trip_within_a_step(float_type):
    x = np.random.default_rng(1).standard_normal((300, 640), dtype=np.float32)  # 6000 blocks, several steps
    raw = quantize(x, float_type)
    assert raw.shape == (300, float_type.row_bytes(640)) and raw.dtype == np.uint8
    back = dequantize(raw, float_type, 640)
    largest = np.abs(x).reshape(300, 20, 32).max(axis=2).repeat(32, axis=1)
    # Q40 has 8 steps towards the largest value's sign and 7 the other way, so a value may be cut by a whole step.
    bound = {
        FloatType.F32: 0 * largest,
        FloatType.F16: np.abs(x) * 2**-11 + 2**-25,
        FloatType.Q40: largest / 8 + largest * 2**-11,
        FloatType.Q80: largest / 127 / 2 + largest * 2**-11,
    }
    assert (np.abs(back - x) <= bound[float_type]).all()


@pytest.mark.parametrize("float_type", FloatType)
def test_dequantized_values_are_fixed_points(float_type):
    x = np.random.default_rng(2).standard_normal((4, 64), dtype=np.float32)
    once = dequantize(quantize(x, float_type), float_type, 64)
    twice = dequantize(quantize(once, float_type), float_type, 64)
    np.testing.assert_allclose(twice, once, rtol=2**-10)


def test_dequantize_reads_known_bytes():
    q40 = struct.pack("<e", 0.5) + bytes(j | (15 - j) << 4 for j in range(16))
    expected = [(j - 8) * 0.5 for j in range(16)] + [(15 - j - 8) * 0.5 for j in range(16)]
    assert dequantize(np.frombuffer(q40, np.uint8)[None], FloatType.Q40, 32)[0].tolist() == expected
    q80 = struct.pack("<e", -0.25) + struct.pack("<32b", *range(-16, 16))
    assert dequantize(np.frombuffer(q80, np.uint8)[None], FloatType.Q80, 32)[0].tolist() == [
        q * -0.25 for q in range(-16, 16)
    ]


@pytest.mark.parametrize("float_type", FloatType)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_values_that_are_not_finite_are_refused(float_type, bad):
    x = np.zeros((2, 64), dtype=np.float32)
    x[1, 40] = bad
    with pytest.raises(ValueError, match="not finite"):
        quantize(x, float_type)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("float_type", [FloatType.F16, FloatType.Q40, FloatType.Q80])
def test_what_is_not_finite_gives_no_warnings(float_type):
    """NaN of both kinds and infinities, whoever reads or writes them."""
    for scale in (0x7C00, 0xFC00, 0x7C01, 0x7E00):
        raw = np.zeros((2, float_type.row_bytes(64)), np.uint8)
        raw.view("<u2")[:, 0] = scale
        raw[:, 2:] = 0x78
        assert not np.isfinite(dequantize(raw, float_type, 64)).all()
    x = np.ones((2, 64), np.float32)
    for bits in (0x7F800000, 0xFF800000, 0x7F800001, 0x7FC00000):
        x.view(np.uint32)[1, 40] = bits
        with pytest.raises(ValueError, match="not finite"):
            quantize(x, float_type)


@pytest.mark.parametrize("float_type", [FloatType.F16, FloatType.Q40, FloatType.Q80])
def test_values_beyond_f16_are_refused(float_type):
    with pytest.raises(ValueError, match="65504"):
        quantize(np.full((1, 32), 1e9, dtype=np.float32), float_type)


def test_rows_of_part_blocks_are_refused():
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize(np.zeros((1, 33), dtype=np.float32), FloatType.Q40)
    with pytest.raises(ValueError, match="18 bytes, not 17"):
        dequantize(np.zeros((1, 17), dtype=np.uint8), FloatType.Q40, 32)


def test_parse_knows_the_four_types():
    assert [FloatType.parse(name) for name in ("f32", "F16", "q40", "Q80")] == list(FloatType)
    with pytest.raises(ValueError, match="unknown float type 'q4'"):
        FloatType.parse("q4")
