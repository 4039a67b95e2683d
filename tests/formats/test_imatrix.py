"""Importance matrices on disk: what is written is read, and what is damaged or another model's is refused."""

import json
import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.errors import FileError, FormatError
from dllama.formats import FloatType, tensor_layout
from dllama.formats.imatrix import MAGIC, ImportanceMatrix, read_imatrix, write_imatrix
from tests.formats.models import config

TENSORS = [info for info in tensor_layout(config()) if info.float_type.is_quantized]


def matrix_for(tensors, seed: int = 0) -> ImportanceMatrix:
    random = np.random.default_rng(seed)
    means = {(info.name, info.layer): random.random(info.columns, dtype=np.float32) for info in tensors}
    return ImportanceMatrix("9f" * 16, 1234, means)


def file_bytes(header: object, values: bytes = b"") -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return MAGIC + struct.pack("<I", len(raw)) + raw + values


@pytest.fixture
def path(tmp_path):
    return tmp_path / "model.imatrix"


def test_what_is_written_is_read(path):
    matrix = matrix_for(TENSORS)
    write_imatrix(path, matrix)
    first = path.read_bytes()
    found = read_imatrix(path, tensor_layout(config()))
    assert (found.digest, found.tokens) == (matrix.digest, 1234)
    assert list(found.means) == list(matrix.means)
    for key, means in matrix.means.items():
        assert found.means[key].dtype == np.float32
        np.testing.assert_array_equal(found.means[key], means)
    write_imatrix(path, found)
    assert path.read_bytes() == first


def test_weights_that_are_not_stored_in_blocks_need_no_importance(path):
    write_imatrix(path, matrix_for(TENSORS[:1]))
    assert len(read_imatrix(path, tensor_layout(config(weight_type=FloatType.F16))).means) == 1
    with pytest.raises(FormatError, match="another model: k of layer 0 is not in it"):
        read_imatrix(path, tensor_layout(config()))


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"dim": 96, "n_heads": 4}, "q of layer 0 has 96 columns, and 64 in it"),
        ({"n_layers": 3}, "q of layer 2 is not in it"),
        ({"hidden_dim": 128}, "w2 of layer 0 has 128 columns, and 96 in it"),
    ],
)
def test_the_importance_of_another_model_is_refused(path, changes, reason):
    write_imatrix(path, matrix_for(TENSORS))
    with pytest.raises(FormatError, match=f"another model: {reason}"):
        read_imatrix(path, tensor_layout(config(**changes)))


def test_files_of_another_kind(path):
    with pytest.raises(FileError, match="no such file"):
        read_imatrix(path)
    for data in (b"", MAGIC, b"GGUF" + bytes(100)):
        path.write_bytes(data)
        with pytest.raises(FormatError, match="not an importance matrix"):
            read_imatrix(path)


def test_a_length_that_is_not_what_the_header_says(path):
    write_imatrix(path, matrix_for(TENSORS))
    whole = path.read_bytes()
    for data in (whole[:-1], whole + b"\0", whole[: len(MAGIC) + 4 + whole.index(b"}") - 11]):
        path.write_bytes(data)
        with pytest.raises(FormatError, match="damaged"):
            read_imatrix(path)


SOUND = {"digest": "00", "tokens": 1, "matrices": [["q", 0, 2]]}


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xff",
        b"[" * 100_000,
        b"[]",
        {},
        SOUND | {"tokens": 0},
        SOUND | {"tokens": "1"},
        SOUND | {"matrices": []},
        SOUND | {"matrices": [["q", 0]]},
        SOUND | {"matrices": [["q", 0, -2]]},
        SOUND | {"matrices": [["q", 0, 2.0]]},
        SOUND | {"matrices": [["q", "0", 2]]},
        SOUND | {"matrices": [["q", [], 2]]},
        SOUND | {"matrices": [["q", 0, 1], ["q", 0, 1]]},
        SOUND | {"matrices": [["q", 0, 1 << 40]]},
    ],
)
def test_headers_that_make_no_sense(path, header):
    path.write_bytes(file_bytes(header, bytes(8)))
    with pytest.raises(FormatError, match="damaged header"):
        read_imatrix(path)


def test_a_header_longer_than_any(path):
    path.write_bytes(MAGIC + struct.pack("<I", 0xFFFFFFFF) + bytes(100))
    with pytest.raises(FormatError, match="damaged header"):
        read_imatrix(path)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -1.0])
def test_values_that_are_no_mean_squares(path, bad):
    path.write_bytes(file_bytes(SOUND, np.array([1, bad], "<f4").tobytes()))
    with pytest.raises(FormatError, match="not all of its values are finite"):
        read_imatrix(path)


@given(st.data())
def test_any_damage_is_told_in_one_line(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("damaged") / "model.imatrix"
    write_imatrix(path, matrix_for(TENSORS[:3]))
    raw = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        raw[data.draw(st.integers(0, len(raw) - 1))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        read_imatrix(path, TENSORS[:3])
    except FormatError as error:
        assert "\n" not in str(error)
