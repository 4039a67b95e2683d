import struct

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter import gguf_file
from converter.gguf_file import read_gguf
from dllama.errors import FileError, FormatError
from tests.converter.gguf_files import gguf_bytes, string, value

METADATA = {"a": "text é", "b": 7, "c": 1.5, "d": True, "e": ["x", ""], "f": np.array([1, 2], "<i4")}
TENSORS = {"one": ("F32", (2, 3), bytes(24)), "two": ("Q4_0", (32,), bytes(18))}


def test_metadata_and_tensors(tmp_path):
    data = gguf_bytes(METADATA, TENSORS)
    (tmp_path / "a.gguf").write_bytes(data)
    metadata, tensors = read_gguf(tmp_path / "a.gguf")
    assert metadata.pop("f").tolist() == [1, 2]
    assert metadata == {key: item for key, item in METADATA.items() if key != "f"}
    one, two = tensors.values()
    assert (one.name, one.kind, one.shape, one.row_bytes, one.nbytes) == ("one", 0, (2, 3), 12, 24)
    assert (two.name, two.kind, two.shape, two.row_bytes, two.nbytes) == ("two", 2, (32,), 18, 18)
    assert one.offset % 32 == 0 and two.offset == one.offset + 32 == len(data) - 32


def test_another_alignment_and_version(tmp_path):
    data = gguf_bytes({"general.alignment": 64}, TENSORS, version=2)
    (tmp_path / "a.gguf").write_bytes(data)
    one, two = read_gguf(tmp_path / "a.gguf")[1].values()
    assert one.offset % 64 == 0 and two.offset == one.offset + 64


def test_what_is_written_is_read(tmp_path):
    metadata = {"a": (gguf_file.STRING, "é"), "b": (gguf_file.ARRAY, gguf_file.STRING, ["x", ""]),
                "c": (gguf_file.ARRAY, gguf_file.F32, [1.0, 2.5]), "d": (gguf_file.BOOL, True)}  # fmt: skip
    shapes = [("one", 0, (2, 3)), ("two", 2, (32,))]
    head, nbytes = gguf_file.header_bytes(metadata, shapes)
    assert (len(head) % 32, nbytes) == (0, 64)
    (tmp_path / "a.gguf").write_bytes(head + bytes(nbytes))
    read, tensors = read_gguf(tmp_path / "a.gguf")
    assert read.pop("c").tolist() == [1.0, 2.5]
    assert read == {"a": "é", "b": ["x", ""], "d": True}
    assert [(t.name, t.kind, t.shape, t.offset - len(head)) for t in tensors.values()] == [
        ("one", 0, (2, 3), 0),
        ("two", 2, (32,), 32),
    ]


HEAD = b"GGUF" + struct.pack("<I", 3)
HUGE = 1 << 60


def pair(kind: int, rest: bytes) -> bytes:
    """A file of one pair of metadata, with room behind it."""
    return HEAD + struct.pack("<QQ", 0, 1) + string("key") + struct.pack("<I", kind) + rest


def tensor(shape, kind=0, offset=0, n_dimensions=None) -> bytes:
    n_dimensions = len(shape) if n_dimensions is None else n_dimensions
    body = string("t") + struct.pack(f"<I{len(shape)}QIQ", n_dimensions, *shape, kind, offset)
    return HEAD + struct.pack("<QQ", 1, 0) + body + bytes(64)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not a GGUF file"),
        (b"GGUF", "not a GGUF file"),
        (bytes(30), "not a GGUF file"),
        (b"GGUF" + struct.pack("<IQQ", 1, 0, 0), "version 1 is not known"),
        (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "a big-endian file"),
        (HEAD + struct.pack("<QQ", HUGE, 0), "1,152,921,504,606,846,976 tensors do not fit in 24 bytes"),
        (HEAD + struct.pack("<QQ", 0, HUGE), "pairs of metadata do not fit"),
        (HEAD + struct.pack("<QQQ", 0, 1, HUGE) + bytes(50), "truncated or damaged: a key of 1,152"),
        (pair(8, struct.pack("<Q", HUGE)), "truncated or damaged: key of 1,152"),
        (pair(8, struct.pack("<Q", 1) + b"\xff"), "a string is not UTF-8"),
        (pair(9, struct.pack("<IQ", 5, HUGE)), "truncated or damaged: key of 4,611"),
        (pair(9, struct.pack("<IQ", 8, HUGE)), "key has 1,152,921,504,606,846,976 values"),
        (pair(9, struct.pack("<IQ", 13, 1) + bytes(8)), "array of type 13"),
        (pair(9, struct.pack("<IQ", 9, 1) * 9), "array of type 9"),
        (pair(13, bytes(8)), "key is of type 13"),
        (HEAD + struct.pack("<QQ", 0, 2) + (string("a") + value(1)) * 2, "key a appears twice"),
        (HEAD + struct.pack("<QQ", 0, 1) + string("general.alignment") + value(0), "general.alignment is 0"),
        (tensor((3,), offset=HUGE), "truncated: tensor t ends at byte"),
        (tensor((HUGE, HUGE)), "truncated: tensor t ends at byte"),
        (tensor((3,), n_dimensions=0), "t has 0 dimensions"),
        (tensor((3,), n_dimensions=1 << 31), "t has 2147483648 dimensions"),
        (tensor((31,), kind=2), "rows of 31 values, which Q4_0 blocks do not fill"),
        (tensor((32,), kind=99), r"of type 99, which is not read \(known: F32, F16, BF16, Q4_0, "),
        (tensor((256,), kind=34), r"of type TQ1_0, which is not read \(known: F32, F16, BF16, Q4_0, "),
        (gguf_bytes({}, TENSORS)[:-40], "truncated: tensor two ends"),
    ],
)  # fmt: skip
def test_refused_with_the_reason(tmp_path, data, reason):
    (tmp_path / "a.gguf").write_bytes(data)
    with pytest.raises(FormatError, match=f"a.gguf: .*{reason}"):
        read_gguf(tmp_path / "a.gguf")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileError, match="no such file"):
        read_gguf(tmp_path / "a.gguf")


WHOLE = gguf_bytes(METADATA, TENSORS)


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "a.gguf"


@given(place=st.integers(0, len(WHOLE) - 1), data=st.binary(max_size=9), cut=st.integers(0, len(WHOLE)))
def test_a_damaged_file_is_read_or_refused(fuzzed, place, data, cut):
    fuzzed.write_bytes((WHOLE[:place] + data + WHOLE[place + len(data) :])[: len(WHOLE) - cut])
    try:
        _, tensors = read_gguf(fuzzed)
    except FormatError:
        return
    assert all(tensor.offset + tensor.nbytes <= fuzzed.stat().st_size for tensor in tensors.values())
