import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.errors import FileError, FormatError
from dllama.formats.vocabulary import T_MAGIC
from dllama.tokenizer import MergeTokenizer, SentencePieceTokenizer, load_tokenizer
from tests.tokenizer.models import as_t


def test_kinds_are_told_by_content(small_model, tmp_path):
    (tmp_path / "a.t").write_bytes(small_model.read_bytes())
    (tmp_path / "b.model").write_bytes(as_t(small_model).read_bytes())
    assert isinstance(load_tokenizer(tmp_path / "a.t"), SentencePieceTokenizer)
    assert isinstance(load_tokenizer(tmp_path / "b.model"), MergeTokenizer)


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not a tokenizer"),
        (struct.pack("<i", 0x0A00ABCD) + bytes(100), "a model, not a tokenizer"),
        (b'{"version": "1.0"}', "a tokenizer.json, which dllama-convert tokenizer turns into a .t file"),
        (b"\n\x05hello", "not a sound SentencePiece model"),
        (struct.pack("<i", T_MAGIC), "not a tokenizer: 4 bytes"),
        (struct.pack("<i", 12) + b"not the rest of one", "truncated"),
    ],
)
def test_other_files_are_refused_by_name_and_reason(tmp_path, data, reason):
    (tmp_path / "a.t").write_bytes(data)
    with pytest.raises(FormatError, match=f"a.t: .*{reason}"):
        load_tokenizer(tmp_path / "a.t")


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileError, match="missing.t: no such file"):
        load_tokenizer(tmp_path / "missing.t")
    with pytest.raises(FileError, match="a folder, not a file"):
        load_tokenizer(tmp_path)
    with open(tmp_path / "large", "wb") as file:
        file.truncate((256 << 20) + 1)
    with pytest.raises(FormatError, match="not a tokenizer: 268,435,457 bytes"):
        load_tokenizer(tmp_path / "large")


@pytest.fixture(scope="module")
def fuzzed(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz") / "tokenizer"


MAGICS = [b"", b"\n", struct.pack("<i", T_MAGIC), struct.pack("<i", 0x567123), struct.pack("<i", 20)]


@given(magic=st.sampled_from(MAGICS), data=st.binary(max_size=200))
def test_any_bytes_give_a_format_error(fuzzed, magic, data):
    fuzzed.write_bytes(magic + data)
    with pytest.raises(FormatError):
        load_tokenizer(fuzzed)
