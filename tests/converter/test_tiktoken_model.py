import base64

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.byte_alphabet import from_alphabet
from converter.tiktoken_model import is_tiktoken, parse_tiktoken, read_tiktoken
from dllama.errors import FormatError
from dllama.formats.vocabulary import PreTokenizer
from dllama.tokenizer import MergeTokenizer
from tests.converter.corpus import CORPUS, recorded


def lines(pieces) -> bytes:
    return b"".join(base64.b64encode(piece) + b" %d\n" % rank for rank, piece in enumerate(pieces))


def test_llama_3_s_file():
    """A recorded tokenizer's pieces in this format; its special tokens are others."""
    values, ids = recorded("llama3")
    pieces = [from_alphabet(text) for text in sorted(values["model"]["vocab"], key=values["model"]["vocab"].get)]
    data = lines(pieces)
    assert is_tiktoken(data[:64])
    vocabulary = parse_tiktoken(data)
    bos = len(pieces)
    assert (vocabulary.bos_id, vocabulary.eos_ids, vocabulary.add_bos) == (bos, (bos + 1, bos + 8, bos + 9), True)
    assert vocabulary.pre_tokenizer is PreTokenizer.LLAMA3
    assert vocabulary.pieces[bos + 6 : bos + 10] == [
        b"<|start_header_id|>",
        b"<|end_header_id|>",
        b"<|eom_id|>",
        b"<|eot_id|>",
    ]
    assert len(vocabulary.pieces) == bos + 256 and vocabulary.pieces[-1] == b"<|reserved_special_token_247|>"
    assert len(set(vocabulary.pieces)) == len(vocabulary.pieces)
    tokenizer = MergeTokenizer(vocabulary)
    plain = [key for key in CORPUS if "special" not in key]
    assert [tokenizer.encode(CORPUS[key]) for key in plain] == [ids[key] for key in plain]


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"IQ== 1\n", "line 1 has rank '1', not 0"),
        (b"IQ== 0\n!! 1\n", "line 2 is no token in base64"),
        (b"IQ== 0\nIg==\n", "line 2 has rank '', not 1"),
    ],
)
def test_refused_with_the_reason(tmp_path, data, reason):
    (tmp_path / "tokenizer.model").write_bytes(data)
    with pytest.raises(FormatError, match=f"tokenizer.model: {reason}"):
        read_tiktoken(tmp_path / "tokenizer.model")


@given(st.binary(max_size=40))
def test_any_bytes_give_a_value_error_or_a_vocabulary(data):
    try:
        vocabulary = parse_tiktoken(b"IQ== 0\n" + data)
    except ValueError:
        return
    assert len(vocabulary.pieces) <= 257 + len(data)
