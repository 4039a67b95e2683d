from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from converter.sentencepiece_model import fields, parse_sentencepiece, read_sentencepiece
from dllama.embedded import tokenizer_path
from dllama.errors import FormatError
from dllama.formats.vocabulary import CONTROL, PreTokenizer
from dllama.tokenizer import MergeTokenizer, SentencePieceTokenizer
from tests.converter.corpus import CORPUS
from tests.tokenizer.models import TEXTS, train


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
        ({"user_defined_symbols": ["<call>"]}, "user-defined piece '<call>', which a .t file cannot mark"),
        ({"user_defined_symbols": ["s"]}, "user-defined piece 's'"),  # which is within <s>
    ],
)
def test_models_that_merging_cannot_reproduce_are_refused(tmp_path, options, reason):
    path = train(tmp_path / "a.model", **{"vocab_size": 400, **options})
    with pytest.raises(FormatError, match=f"a.model: .*{reason}"):
        read_sentencepiece(path)


def same_ids(path, texts) -> bool:
    """Whether the model and the vocabulary that is read from it agree on every text."""
    tokenizer, library = MergeTokenizer(read_sentencepiece(path)), SentencePieceTokenizer(path.read_bytes())
    return [tokenizer.encode(text) for text in texts] == [library.encode(text) for text in texts]


def test_user_defined_characters_that_are_in_no_other_piece(tmp_path):
    path = train(tmp_path / "a.model", vocab_size=400, user_defined_symbols=["\n", "§"])
    assert same_ids(path, [*CORPUS.values(), *TEXTS, "\n", "\n\nthe §§ file\n § ", "§"])


def test_the_embedded_tokenizer_encodes_the_same():
    assert same_ids(Path(tokenizer_path()), [*CORPUS.values(), *TEXTS, "Question: 2+2?\nAnswer: 4\n#### 4\n"])


def test_a_model_that_puts_no_space_before_its_text(tmp_path):
    path = train(tmp_path / "a.model", vocab_size=400, add_dummy_prefix=False)
    assert read_sentencepiece(path).pre_tokenizer is PreTokenizer.SPACE_NEVER
    assert same_ids(path, [*CORPUS.values(), *TEXTS])
    tokenizer, library = MergeTokenizer(read_sentencepiece(path)), SentencePieceTokenizer(path.read_bytes())
    for text in ("the file", " the file", "<s>the"):
        ids = library.encode(text, bos=False)
        assert tokenizer.decode(ids) == library.decode(ids) == text


def test_fields_of_a_message():
    # Field 1: varint 300 (two groups of seven bits); 2: bytes "hi"; 3: four bytes; 4: eight bytes.
    message = b"\x08\xac\x02" + b"\x12\x02hi" + b"\x1d\x00\x00\x80\x3f" + b"\x21" + bytes(8)
    assert list(fields(message)) == [(1, 300), (2, b"hi"), (3, b"\x00\x00\x80\x3f"), (4, bytes(8))]


@given(st.binary(max_size=100))
def test_any_bytes_give_a_value_error(data):
    for prefix in (b"", b"\n\x05", b"\x12\x02\x18\x02\n"):
        with pytest.raises(ValueError):
            parse_sentencepiece(prefix + data)
