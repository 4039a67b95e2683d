import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from converter.sentencepiece_model import fields, parse_sentencepiece, read_sentencepiece
from dllama.errors import FormatError
from dllama.formats.vocabulary import CONTROL
from dllama.tokenizer import MergeTokenizer, SentencePieceTokenizer
from tests.tokenizer.models import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=400)


def test_the_vocabulary_is_the_library_s(model):
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    vocabulary = read_sentencepiece(model)
    ids = list(range(library.vocab_size()))
    assert vocabulary.pieces == [library.id_to_piece(i).replace("\u2581", " ").encode() for i in ids]
    assert vocabulary.scores == [library.get_score(i) for i in ids]
    assert (vocabulary.bos_id, vocabulary.eos_ids, vocabulary.add_bos) == (1, (2,), True)


def test_models_without_bos_and_eos(tmp_path):
    vocabulary = read_sentencepiece(train(tmp_path / "a.model", vocab_size=400, bos_id=-1, eos_id=-1))
    assert (vocabulary.bos_id, vocabulary.eos_ids) == (None, ())


def test_control_pieces_are_found_where_they_are_asked_for(tmp_path):
    path = train(tmp_path / "a.model", vocab_size=400, control_symbols=["[INST]", "[/INST]"])
    vocabulary = read_sentencepiece(path)
    ids = [vocabulary.pieces.index(piece) for piece in (b"[INST]", b"[/INST]")]
    assert [vocabulary.scores[i] for i in ids] == [CONTROL] * 2
    tokenizer, library = MergeTokenizer(vocabulary), SentencePieceTokenizer(path.read_bytes())
    text = "<s>[INST] the file[/INST]x</s>"
    assert tokenizer.encode(text) == library.encode(text)
    found = tokenizer.encode(text, bos=False, special=True)
    assert found == library.encode(text, bos=False, special=True)
    assert found[:2] == [1, ids[0]] and found[-1] == 2 and ids[1] in found


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"model_type": "unigram"}, "not a BPE model"),
        ({"remove_extra_whitespaces": True}, "changes its text first"),
        ({"normalization_rule_name": "nmt_nfkc"}, "changes its text first"),
        ({"add_dummy_prefix": False}, "changes its text first"),
        ({"user_defined_symbols": ["<call>"]}, "user-defined pieces"),
    ],
)
def test_models_that_merging_cannot_reproduce_are_refused(tmp_path, options, reason):
    path = train(tmp_path / "a.model", **{"vocab_size": 400, **options})
    with pytest.raises(FormatError, match=f"a.model: .*{reason}"):
        read_sentencepiece(path)


def test_fields_of_a_message():
    # Field 1: varint 300 (two groups of seven bits); 2: bytes "hi"; 3: four bytes; 4: eight bytes.
    message = b"\x08\xac\x02" + b"\x12\x02hi" + b"\x1d\x00\x00\x80\x3f" + b"\x21" + bytes(8)
    assert list(fields(message)) == [(1, 300), (2, b"hi"), (3, b"\x00\x00\x80\x3f"), (4, bytes(8))]


@given(st.binary(max_size=100))
def test_any_bytes_give_a_value_error(data):
    for prefix in (b"", b"\n\x05", b"\x12\x02\x18\x02\n"):
        with pytest.raises(ValueError):
            parse_sentencepiece(prefix + data)
