import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from dllama.tokenizer import SentencePieceTokenizer, load_tokenizer
from tests.tokenizer.models import TEXTS, train


def test_encodes_and_decodes_as_the_library(sentencepiece_model):
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = load_tokenizer(sentencepiece_model)
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (library.vocab_size(), 1, (2,))
    for text in TEXTS:
        ids = library.encode(text)
        assert tokenizer.encode(text, bos=False) == ids
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(tokenizer.encode(text)) == library.decode(ids)


@pytest.mark.parametrize(
    "options",
    [
        {"model_type": "unigram", "vocab_size": 500},
        {"normalization_rule_name": "nmt_nfkc", "remove_extra_whitespaces": True},
        {"add_dummy_prefix": False},
        {"byte_fallback": False, "vocab_size": 400},
    ],
)
def test_models_of_other_settings_decode_as_the_library(tmp_path, options):
    path = train(tmp_path / "other.model", **options)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    tokenizer = load_tokenizer(path)
    for text in TEXTS:
        ids = tokenizer.encode(text, bos=False)
        assert ids == library.encode(text)
        assert tokenizer.decode(ids) == library.decode(ids)


def test_a_stream_continues_a_text(small_model):
    """What follows a prompt keeps its spaces; what follows bos loses the one that encoding added."""
    tokenizer = load_tokenizer(small_model)
    ids = tokenizer.encode("the file, 世界🔶 and")
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == "the file, 世界🔶 and"
    stream = tokenizer.stream()
    assert "".join(map(stream.push, ids[1:])) == " the file, 世界🔶 and"


def test_a_model_without_bos_and_eos(tmp_path):
    tokenizer = load_tokenizer(train(tmp_path / "bare.model", bos_id=-1, eos_id=-1))
    assert (tokenizer.bos_id, tokenizer.eos_ids) == (None, ())
    assert tokenizer.encode("x") == tokenizer.encode("x", bos=False)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    return train(tmp_path_factory.mktemp("tiny") / "tiny.model", vocab_size=360).read_bytes()


@given(st.binary(max_size=200))
def test_any_bytes_give_a_value_error(data):
    for prefix in (b"", b"\n"):
        with pytest.raises(ValueError, match="not a sound SentencePiece model"):
            SentencePieceTokenizer(prefix + data)


@settings(max_examples=50)
@given(edits=st.lists(st.tuples(st.integers(0), st.integers(0, 255)), max_size=4), cut=st.integers(0, 400))
def test_a_damaged_model_works_or_gives_a_value_error(tiny_model, edits, cut):
    data = bytearray(tiny_model[: len(tiny_model) - cut])
    for place, value in edits:
        data[place % len(data)] = value
    try:
        tokenizer = SentencePieceTokenizer(bytes(data))
    except ValueError:
        return
    tokenizer.decode(tokenizer.encode("the file"))
