import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.tensors import HalfSplit, Joined
from dllama.formats import FloatType, quantize
from dllama.formats.tensor import Tensor
from tests.converter.checkpoints import encoded


@given(st.integers(0, 7), st.integers(1, 8), st.sampled_from([0, 1]), st.integers(1, 4))
def test_parts_make_the_whole(tmp_path_factory, start, height, axis, parts):
    folder = tmp_path_factory.mktemp("parts")
    whole = np.arange(8 * 12 * parts, dtype=np.float32).reshape(8 * parts, 12)
    if axis == 1:
        whole = whole.reshape(8, 12 * parts)
    tensors = []
    for rank, part in enumerate(np.split(whole, parts, axis=axis)):
        path = folder / str(rank)
        path.write_bytes(b"head" + part.tobytes())
        tensors.append(Tensor("a", path, "F32", part.shape, 4))
    joined = Joined(tuple(tensors), axis)
    stop = min(start + height, len(whole))
    assert joined.shape == whole.shape
    np.testing.assert_array_equal(joined.rows(start, stop), whole[start:stop])
    np.testing.assert_array_equal(joined.stored(start, stop, FloatType.F32).view(np.float32), whole[start:stop])
    assert joined.stored(start, stop, FloatType.F16) is None


@pytest.mark.parametrize("dtype", ["F32", "F16"])
def test_bytes_that_are_those_of_the_model_file(tmp_path, dtype):
    values = np.random.default_rng(0).standard_normal((8, 6), dtype=np.float32)
    (tmp_path / "a").write_bytes(encoded(values, dtype)[2])
    tensor = Tensor("a", tmp_path / "a", dtype, (8, 6), 0)
    heads = HalfSplit(**vars(tensor), head_dim=4)
    for source in (tensor, heads):
        rows = source.rows(4, 8)
        np.testing.assert_array_equal(source.stored(4, 8, FloatType[dtype]), quantize(rows, FloatType[dtype]))
        assert not any(source.stored(4, 8, other) is not None for other in FloatType if other.name != dtype)
