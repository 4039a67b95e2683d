import json
import struct
import tracemalloc

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.errors import FormatError
from dllama.formats.safetensors import read_safetensors, read_with_metadata, write_safetensors
from tests.converter.checkpoints import LLAMA, random_weights, safetensors_bytes, write


def file_of(header, data=b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_values_come_back(tmp_path, dtype):
    weights = random_weights(LLAMA, dtype)
    tensors = read_safetensors(write(tmp_path, LLAMA, weights, dtype) / "model.safetensors")
    assert tensors.keys() == weights.keys()
    for name, values in weights.items():
        tensor = tensors[name]
        assert (tensor.shape, tensor.dtype) == (values.shape, dtype)
        rows = np.atleast_2d(values)
        np.testing.assert_array_equal(tensor.rows(0, len(rows)), rows)
        np.testing.assert_array_equal(tensor.rows(len(rows) // 2, len(rows)), rows[len(rows) // 2 :])


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not a safetensors file: 0 bytes"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (b"1234567", "not a safetensors file: 7 bytes"),
        (struct.pack("<Q", 1 << 63), "a header of 9,223,372,036,854,775,808 bytes"),
        (file_of(b"{}")[:-1], "a header of 2 bytes"),
        (file_of(b"{"), "not JSON"),
        (file_of(b"\xff\xfe"), "not UTF-8"),
        (file_of(b"[" * 100_000), "nested too deeply"),
        (file_of(b"[]"), "not a JSON object"),
        (file_of(b'{"a": {"dtype": "F32", "dtype": "F32"}}'), "dtype appears twice"),
        (file_of({"__metadata__": {"a": 1}}), "__metadata__ does not map names to text"),
        (file_of({"a": 1}), "tensor a is not described by an object"),
        (file_of({"a": {}}), "tensor a lacks a proper dtype"),
        (file_of({"a": entry(shape=(-1,))}, bytes(8)), "tensor a lacks a proper"),
        (file_of({"a": entry(shape=(2.0,))}, bytes(8)), "tensor a lacks a proper"),
        (file_of({"a": entry(shape=(True, 2))}, bytes(8)), "tensor a lacks a proper"),
        (file_of({"a": entry(offsets=(0, 8, 8))}, bytes(8)), "tensor a lacks a proper"),
        (file_of({"a": entry(offsets=(8, 0))}, bytes(8)), "truncated: tensor a|lacks a proper"),
        (file_of({"a": entry()}, bytes(7)), "truncated: tensor a ends at byte"),
        (file_of({"a": entry(shape=(3,))}, bytes(8)), r"tensor a is F32 \[3\] but has 8 bytes"),
        (file_of({"a": entry(shape=(1 << 62, 1 << 62))}, bytes(8)), "tensor a is F32"),
        (file_of({"a": entry()}, bytes(9)), "oversized"),
        (file_of({"a": entry(), "b": entry()}, bytes(8)), "an overlap before tensor b"),
        (file_of({"a": entry(), "b": entry(offsets=(12, 20))}, bytes(20)), "a gap or an overlap before tensor b"),
    ],
)
def test_refused_with_the_reason(tmp_path, data, reason):
    path = tmp_path / "a.safetensors"
    path.write_bytes(data)
    with pytest.raises(FormatError, match=f"a.safetensors: .*{reason}"):
        read_safetensors(path)


def test_tensors_of_unknown_types_are_listed_and_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(safetensors_bytes({"a": ("F4", (4,), bytes(2)), "b": ("I64", (), bytes(8))}))
    assert {name: tensor.dtype for name, tensor in read_safetensors(path).items()} == {"a": "F4", "b": "I64"}


def test_claims_of_a_header_allocate_nothing(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(file_of({"a": entry(shape=(1 << 40,), offsets=(0, 1 << 42))}))
    tracemalloc.start()
    with pytest.raises(FormatError, match="truncated"):
        read_safetensors(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "a.safetensors"


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-5, 40), st.text(max_size=5)),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)),
    max_leaves=8,
)
entries = st.fixed_dictionaries(
    {
        "dtype": st.one_of(st.sampled_from(["F32", "F16", "BF16", "I8", "F4"]), json_values),
        "shape": st.one_of(st.lists(st.integers(0, 4), max_size=3), json_values),
        "data_offsets": st.one_of(st.lists(st.integers(0, 32), min_size=2, max_size=2), json_values),
    }
)


@given(
    header=st.one_of(st.binary(max_size=60), json_values, st.dictionaries(st.text(max_size=3), entries, max_size=3)),
    data=st.binary(max_size=40),
)
def test_any_bytes_give_tensors_inside_the_file_or_a_format_error(fuzzed, header, data):
    content = file_of(header, data)
    fuzzed.write_bytes(content)
    try:
        tensors = read_safetensors(fuzzed)
    except FormatError:
        return
    for tensor in tensors.values():
        if len(tensor.shape) == 1 and tensor.dtype in ("F32", "F16", "BF16"):
            assert tensor.rows(0, 1).shape == (1, *tensor.shape)


def test_what_is_written_is_read(tmp_path):
    path = tmp_path / "a.safetensors"
    rng = np.random.default_rng(0)
    arrays = {"x": rng.standard_normal((2, 3), np.float32), "y": np.float16(rng.standard_normal((5,)))}
    write_safetensors(path, arrays | {"z": arrays["x"].T}, {"kind": "of a test"})
    tensors, metadata = read_with_metadata(path)
    assert metadata == {"kind": "of a test"} and [tensor.dtype for tensor in tensors.values()] == ["F32", "F16", "F32"]
    for name, values in arrays.items():
        np.testing.assert_array_equal(tensors[name].values(), values)
    np.testing.assert_array_equal(tensors["z"].values(), arrays["x"].T)
    assert struct.unpack_from("<Q", path.read_bytes())[0] % 8 == 0


def test_the_format_s_own_library_reads_what_is_written(tmp_path):
    library = pytest.importorskip("safetensors", reason="the library's own word: pip install safetensors")
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    write_safetensors(tmp_path / "a.safetensors", {"x": values}, {"kind": "of a test"})
    with library.safe_open(tmp_path / "a.safetensors", "numpy") as file:
        assert file.metadata() == {"kind": "of a test"}
        np.testing.assert_array_equal(file.get_tensor("x"), values)
