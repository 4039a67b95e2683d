import importlib.util
import io
import pickle
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.torch_file import read_torch_file
from dllama.errors import FormatError
from tests.converter.checkpoints import LLAMA, encoded, random_weights, write_torch
from tests.converter.torch_files import archive, state_pickle, strides_of, tensor_pickle, torch_bytes

SIX = np.arange(6, dtype=np.float32)
DATA = {"0": SIX.tobytes()}


def pickled(offset=0, shape=(2, 3), strides=None, key="0", dtype="F32", count=6) -> bytes:
    return state_pickle({"a": tensor_pickle(dtype, key, count, offset, shape, strides or strides_of(shape))})


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16"])
def test_values_come_back(tmp_path, dtype):
    weights = random_weights(LLAMA, dtype)
    tensors = read_torch_file(write_torch(tmp_path / "a.pth", weights, dtype))
    assert tensors.keys() == weights.keys()
    for name, values in weights.items():
        assert (tensors[name].shape, tensors[name].dtype) == (values.shape, dtype)
        rows = np.atleast_2d(values)
        np.testing.assert_array_equal(tensors[name].rows(0, len(rows)), rows)
        np.testing.assert_array_equal(tensors[name].rows(len(rows) // 2, len(rows)), rows[len(rows) // 2 :])


@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="torch is not installed (extra: train)")
@pytest.mark.parametrize("kind", ["float32", "float16", "bfloat16"])
def test_what_torch_saves(tmp_path, kind):
    import torch

    base = torch.randn(4, 6, generator=torch.Generator().manual_seed(0)).to(getattr(torch, kind))
    module = torch.nn.Linear(6, 4, dtype=getattr(torch, kind))
    for state in (
        {"whole": base, "part": base[1:3], "row": base[2]},
        module.state_dict(),
        dict(module.named_parameters()),
    ):
        torch.save(state, tmp_path / "a.pth")
        tensors = read_torch_file(tmp_path / "a.pth")
        assert tensors.keys() == state.keys()
        for name, values in state.items():
            expected = np.atleast_2d(values.detach().float().numpy())
            np.testing.assert_array_equal(tensors[name].rows(0, len(expected)), expected)
    torch.save({"a": base}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(FormatError, match="written by torch before 1.6"):
        read_torch_file(tmp_path / "old.pth")
    torch.save({"a": base.T}, tmp_path / "transposed.pth")
    with pytest.raises(FormatError, match=r"tensor a does not lie row after row \(strides \[1, 6\]\)"):
        read_torch_file(tmp_path / "transposed.pth")


def test_tensors_that_share_a_storage(tmp_path):
    first, second = tensor_pickle("F32", "0", 6, 0, (2, 2), (2, 1)), tensor_pickle("F32", "0", 6, 4, (1, 2), (9, 1))
    (tmp_path / "a.pth").write_bytes(archive(state_pickle({"a": first, "b": second}), DATA))
    tensors = read_torch_file(tmp_path / "a.pth")
    np.testing.assert_array_equal(tensors["a"].rows(0, 2), [[0, 1], [2, 3]])
    np.testing.assert_array_equal(tensors["b"].rows(0, 1), [[4, 5]])


def test_a_pickle_that_would_run_something(tmp_path):
    class Harmful:
        def __reduce__(self):
            return eval, ("1",)

    (tmp_path / "a.pth").write_bytes(archive(pickle.dumps({"a": Harmful()}, 2), {}))
    with pytest.raises(FormatError, match="a.pth: refused: its pickle asks for .*builtin.*eval.*nothing was run"):
        read_torch_file(tmp_path / "a.pth")


def compressed(member: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        for path, data in {"a/data.pkl": pickled(), "a/data/0": DATA["0"]}.items():
            file.writestr(path, data, zipfile.ZIP_DEFLATED if path.endswith(member) else zipfile.ZIP_STORED)
    return out.getvalue()


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not a torch checkpoint: not a zip archive"),
        (b"\x80\x02" + bytes(100), "written by torch before 1.6"),
        (b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        (archive(pickled(), DATA)[:-30], "truncated or not a torch checkpoint"),
        (archive(pickled(), DATA)[:300], "truncated or not a torch checkpoint"),
        (archive(pickled(), {}), "the values of tensor a are missing"),
        (archive(pickled(key="../0"), DATA), "the values of tensor a are missing"),
        (archive(pickled(), DATA, byteorder=b"big"), "big-endian"),
        (archive(pickled(), DATA, prefix="a/b"), "0 members named data.pkl"),
        (archive(pickled(shape=(3, 3)), DATA), r"tensor a is \[3, 3\], more than the 24 bytes"),
        (archive(pickled(offset=1), DATA), "more than the 24 bytes"),
        (archive(pickled(dtype="I64"), DATA), "more than the 24 bytes"),
        (archive(pickled(shape=(1 << 30, 1 << 30), strides=(1 << 30, 1)), DATA), "more than the 24 bytes"),
        (archive(pickled(strides=(1, 2)), DATA), r"tensor a does not lie row after row \(strides \[1, 2\]\)"),
        (archive(pickled(strides=(0, 1)), DATA), "does not lie row after row"),
        (archive(b"garbage", DATA), "pickle"),
        (compressed("data.pkl"), "a/data.pkl is compressed"),
        (compressed("data/0"), "a/data/0 is compressed"),
    ],
)
def test_refused_with_the_reason(tmp_path, data, reason):
    (tmp_path / "a.pth").write_bytes(data)
    with pytest.raises(FormatError, match=f"a.pth: .*{reason}"):
        read_torch_file(tmp_path / "a.pth")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "a.pth"


SOUND = torch_bytes({"a": encoded(SIX.reshape(2, 3), "F32"), "b": encoded(SIX, "F16")})


@given(changes=st.dictionaries(st.integers(0, len(SOUND) - 1), st.integers(0, 255), max_size=4), cut=st.integers(0, 40))
def test_a_damaged_file_gives_tensors_inside_it_or_a_format_error(fuzzed, changes, cut):
    data = bytearray(SOUND)
    for at, value in changes.items():
        data[at] = value
    fuzzed.write_bytes(data[: len(data) - cut])
    try:
        tensors = read_torch_file(fuzzed)
    except FormatError:
        return
    for tensor in tensors.values():
        assert 0 <= tensor.offset and tensor.offset + tensor.nbytes <= len(data) - cut
