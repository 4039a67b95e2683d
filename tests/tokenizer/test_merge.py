import random

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from dllama.errors import PromptError
from dllama.formats.vocabulary import ADDED, CONTROL, UNMERGED, PreTokenizer, Vocabulary, read_t, write_bin
from dllama.tokenizer import MergeTokenizer, load_tokenizer
from dllama.tokenizer.merge import merge
from tests.tokenizer.models import TEXTS, as_t, train


def naive_merge(symbols, ids, scores):
    """The definition: look at every pair, join the best, begin again."""
    symbols = list(symbols)
    while True:
        pairs = [(-scores[ids[a + b]], i) for i, (a, b) in enumerate(zip(symbols, symbols[1:], strict=False))
                 if a + b in ids]  # fmt: skip
        if not pairs:
            return symbols
        _, i = min(pairs)
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


@given(
    st.lists(st.sampled_from([b"a", b"b", b"c"]), max_size=40),
    st.dictionaries(st.text("abc", min_size=2, max_size=5).map(str.encode), st.integers(-4, 4), max_size=25),
)
def test_merging_is_its_definition(symbols, pieces):
    ids = {piece: i for i, piece in enumerate(pieces)}
    scores = list(pieces.values())
    longest = max(map(len, pieces), default=0)
    assert merge(symbols, ids, scores, longest) == naive_merge(symbols, ids, scores)


def test_a_t_file_encodes_as_its_sentencepiece_model(sentencepiece_model):
    library = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_model))
    tokenizer = load_tokenizer(as_t(sentencepiece_model))
    rng = random.Random(0)
    alphabet = " \n\t\u2581aA.é世🔶\u200d\x00#\u3000<s>0x41in the "
    odd = ["".join(rng.choices(alphabet, k=rng.randrange(1, 60))) for _ in range(300)]
    for text in TEXTS + odd:
        ids = library.encode(text)
        assert tokenizer.encode(text, bos=False) == ids, text
        assert tokenizer.encode(text) == [1, *ids]
        assert tokenizer.decode(ids) == library.decode(ids) == text.replace("\u2581", " ")


def test_byte_pieces_may_be_stored_as_bytes(small_model):
    spelled = read_t(as_t(small_model))
    first = spelled.pieces.index(b"<0x00>")
    raw = [*spelled.pieces[:first], *(bytes([b]) for b in range(256)), *spelled.pieces[first + 256 :]]
    a = MergeTokenizer(spelled)
    b = MergeTokenizer(Vocabulary(raw, spelled.scores, spelled.bos_id, spelled.eos_ids))
    for text in TEXTS:
        assert a.encode(text) == b.encode(text)
        assert a.decode(a.encode(text)) == b.decode(b.encode(text))


def test_llama2_c_s_file_encodes_alike(small_model, tmp_path):
    as_t_file = load_tokenizer(as_t(small_model))
    write_bin(tmp_path / "tokenizer.bin", read_t(as_t(small_model)))
    as_bin_file = load_tokenizer(tmp_path / "tokenizer.bin")
    assert (as_bin_file.bos_id, as_bin_file.eos_ids) == (1, (2,))
    for text in TEXTS:
        assert as_bin_file.encode(text) == as_t_file.encode(text)


def test_without_byte_pieces_runs_of_unknown_characters_are_one_piece(tmp_path):
    model = train(tmp_path / "unk.model", byte_fallback=False, vocab_size=400)
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))
    tokenizer = load_tokenizer(as_t(model))
    for text in ["世界 and 🔶🔶", "the file's x", "世", "a世b界"]:
        ids = library.encode(text)
        assert 0 in ids or text.isascii()
        assert tokenizer.encode(text, bos=False) == ids
        assert tokenizer.decode(ids) == library.decode(ids)


def byte_level(extra=(), specials=(b"<|begin|>", b"<|end|>"), **changes) -> MergeTokenizer:
    """A vocabulary of Llama 3's kind: the printable bytes, the others, merges, then the special tokens."""
    order = [*range(33, 127), *range(161, 173), *range(174, 256), *range(33), *range(127, 161), 173]
    pieces = [bytes([byte]) for byte in order] + list(extra)
    bos_id = len(pieces)
    scores = [-float(i) for i in range(bos_id)] + [0.0] * len(specials)
    return MergeTokenizer(
        Vocabulary(pieces + list(specials), scores, **{"bos_id": bos_id, "eos_ids": (bos_id + 1,), **changes})
    )


def test_byte_level_vocabularies_add_no_space_and_merge_bytes():
    tokenizer = byte_level([b" w", b"or", b" wor", "é".encode()])
    ids = tokenizer.encode("a wor é")
    assert ids[0] == tokenizer.bos_id == 260
    assert tokenizer.decode(ids) == "a wor é"
    assert ids[1:] == [ord("a") - 33, 258, tokenizer.encode(" ", bos=False)[0], 259]
    assert tokenizer.encode("世界🔶", bos=False) != [] and tokenizer.decode(tokenizer.encode("世界🔶")) == "世界🔶"
    assert tokenizer.decode(tokenizer.encode(" x")) == " x"


def test_special_tokens_are_not_matched_in_text_and_decode_to_nothing():
    tokenizer = byte_level(specials=(b"ab", b"<|end|>", b"abc"))
    assert len(tokenizer.encode("abc", bos=False)) == 3
    assert tokenizer.decode([tokenizer.bos_id, *tokenizer.encode("abc", bos=False), *tokenizer.eos_ids, 258]) == "abc"


def test_bos_is_added_where_the_file_asks_for_it():
    assert byte_level().encode("")[0] == 256
    assert byte_level(add_bos=False).encode("") == []
    assert byte_level().encode("", bos=False) == []
    assert byte_level(bos_id=None, eos_ids=()).encode("") == []


def test_long_texts_take_no_more_than_their_share(small_model):
    """A run of one letter is the worst case: every pair ties, and merges cascade."""
    tokenizer = load_tokenizer(as_t(small_model))
    ids = tokenizer.encode("a" * 50_000)
    assert tokenizer.decode(ids) == "a" * 50_000


def test_text_that_is_not_unicode_is_refused(small_model):
    for tokenizer in (load_tokenizer(small_model), load_tokenizer(as_t(small_model))):
        with pytest.raises(PromptError, match="not valid Unicode at character 2"):
            tokenizer.encode("ab\udcff")


def test_ids_outside_the_vocabulary_are_refused(small_model):
    for tokenizer in (load_tokenizer(small_model), load_tokenizer(as_t(small_model))):
        for token_id in (-1, 700):
            with pytest.raises(ValueError, match=f"token id {token_id} is outside the vocabulary of 700 tokens"):
                tokenizer.decode([token_id])


def test_a_vocabulary_that_cannot_spell_is_refused():
    with pytest.raises(ValueError, match="neither byte pieces nor an unknown piece"):
        MergeTokenizer(Vocabulary([b"a", b"b"], [0.0, 0.0], None, ()))


def test_a_byte_level_vocabulary_needs_every_byte():
    pieces = [bytes([byte]) for byte in range(256)]
    for v in (
        Vocabulary(pieces[1:], [0.0] * 255, None, (), pre_tokenizer=PreTokenizer.LLAMA3),
        Vocabulary([b"ab"] * 256 + pieces[::-1], [0.0] * 512, bos_id=256, eos_ids=()),  # special from 256 on
        Vocabulary(pieces, [CONTROL] + [0.0] * 255, None, (), pre_tokenizer=PreTokenizer.QWEN2),
    ):
        with pytest.raises(ValueError, match="lacks some of the 256 bytes"):
            MergeTokenizer(v)


def test_special_tokens_are_found_where_they_are_asked_for(small_model):
    """In a `.t` file as in the model that it was made from; the longest counts, and what lies between is text."""
    tokenizers = load_tokenizer(small_model), load_tokenizer(as_t(small_model))
    text = "<s>the file</s> x<unk><s>"
    found = [tokenizer.encode(text, bos=False, special=True) for tokenizer in tokenizers]
    parts = [tokenizers[0].encode(part, bos=False) for part in ("the file", " x")]
    assert found == [[1, *parts[0], 2, *parts[1], 0, 1]] * 2
    tokenizer = byte_level(specials=(b"<a>", b"<a>b", b"<c>"))
    bos = tokenizer.bos_id
    assert tokenizer.encode("<a>b<a><c>", bos=False, special=True) == [bos + 1, bos, bos + 2]


def test_scores_say_what_a_piece_is():
    tokenizer = MergeTokenizer(
        Vocabulary([b"<unk>", b"a", b"b", b"ab", b"aa", b"<t>", b"<c>"],
                   [0.0, 0.0, 0.0, UNMERGED, -1.0, ADDED, CONTROL], None, (), pre_tokenizer=PreTokenizer.SPACE_NEVER)
    )  # fmt: skip
    assert tokenizer.encode("abaa") == [1, 2, 4]
    assert tokenizer.encode("a<t><c>", special=True) == [1, 5, 6]
    assert tokenizer.decode([5, 6, 1]) == "<t>a"


STYLES = st.none() | st.sampled_from([style for style in PreTokenizer if not style.byte_level])


@given(st.lists(st.binary(max_size=3), min_size=1, max_size=20), st.text(max_size=20), STYLES, st.booleans())
def test_any_vocabulary_encodes_any_text(pieces, text, style, special):
    scores = [[0.0, UNMERGED, ADDED, CONTROL][len(piece)] for piece in pieces]
    tokenizer = MergeTokenizer(Vocabulary([b"<unk>", *pieces], [0.0, *scores], None, (), pre_tokenizer=style))
    ids = tokenizer.encode(text, special=special)
    assert all(0 <= token_id < tokenizer.vocab_size for token_id in ids)
    tokenizer.decode(ids)
