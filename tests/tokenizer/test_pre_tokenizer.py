import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.formats.vocabulary import PreTokenizer, Vocabulary
from dllama.tokenizer.pre_tokenizer import PATTERNS, recognise, words

LLAMA3, QWEN2, GPT2, SMOLLM = PreTokenizer.LLAMA3, PreTokenizer.QWEN2, PreTokenizer.GPT2, PreTokenizer.SMOLLM


@pytest.mark.parametrize(
    "style, text, expected",
    [
        (LLAMA3, "I'LL don't", ["I", "'LL", " don", "'t"]),
        (GPT2, "I'LL don't", ["I", "'", "LL", " don", "'t"]),
        (LLAMA3, "a 12345", ["a", " ", "123", "45"]),
        (QWEN2, "a 123", ["a", " ", "1", "2", "3"]),
        (GPT2, "a 123", ["a", " 123"]),
        (SMOLLM, "a  123", ["a", "  ", "1", "2", "3"]),
        (LLAMA3, "x  y", ["x", " ", " y"]),
        (LLAMA3, "x\n\n  y \n", ["x", "\n\n", " ", " y", " \n"]),
        (GPT2, "x\n\n  y", ["x", "\n\n ", " y"]),
        (LLAMA3, "(a) _b!!\n\n", ["(a", ")", " _", "b", "!!\n\n"]),
        (LLAMA3, "'\u017fx 'la", ["'\u017f", "x", " '", "la"]),
        (LLAMA3, "a\u0301b\u1f600", ["a", "\u0301b\u1f60", "0"]),
        (LLAMA3, "½Ⅷ²٣x", ["½Ⅷ²", "٣", "x"]),
        (LLAMA3, "a\u00a0b\x1cc", ["a", "\u00a0b", "\x1cc"]),
        (QWEN2, "A\u030a", ["\u00c5"]),
        (LLAMA3, "", []),
    ],
)
def test_words(style, text, expected):
    assert list(words(text, style)) == expected


@pytest.mark.parametrize("style", PATTERNS)
@given(text=st.text(st.characters() | st.sampled_from(" \n'sSlL09._"), max_size=30))
def test_words_are_the_text(style, text):
    assert "".join(words(text, style)) == (unicodedata.normalize("NFC", text) if style is QWEN2 else text)


@pytest.mark.parametrize(
    "special, family",
    [
        ([b"<|begin_of_text|>", b"<|end_of_text|>"], LLAMA3),
        (["<｜begin▁of▁sentence｜>".encode(), b"<|reserved_special_token_0|>"], LLAMA3),  # DeepSeek's distilled Llama
        ([b"<|endoftext|>", b"<|im_start|>", b"<|im_end|>"], QWEN2),
        ([b"<|endoftext|>"], None),
        ([b"<s>", b"</s>"], None),
    ],
)
def test_families_are_told_by_their_special_tokens(special, family):
    pieces = [bytes([byte]) for byte in range(256)] + special
    assert recognise(Vocabulary(pieces, [0.0] * len(pieces), 256, ())) is family
    assert recognise(Vocabulary(pieces, [0.0] * len(pieces), None, ())) is None
