from hypothesis import given
from hypothesis import strategies as st

from dllama.tokenizer import StreamDecoder
from dllama.tokenizer.base import special_pattern

BYTES = [bytes([byte]) for byte in range(256)]


def decoder(texts, prefix_after=None, at_start=False):
    return StreamDecoder(texts, prefix_after=prefix_after, at_start=at_start)


@given(st.text(max_size=30))
def test_characters_come_whole_as_soon_as_they_are_complete(text):
    stream = decoder(BYTES)
    for character in text:
        *first, last = character.encode()
        assert [stream.push(byte) for byte in first] == [""] * len(first)
        assert stream.push(last) == character
    assert stream.flush() == ""


@given(st.binary(max_size=30))
def test_any_bytes_give_what_decoding_them_at_once_gives(data):
    stream = decoder(BYTES)
    assert "".join(map(stream.push, data)) + stream.flush() == data.decode("utf-8", "replace")


def test_a_character_never_completed_ends_as_a_replacement():
    stream = decoder(BYTES)
    assert [stream.push(byte) for byte in "🔶".encode()[:3]] == ["", "", ""]
    assert stream.flush() == "\ufffd"


def test_the_space_before_a_text_goes_after_bos_and_nowhere_else():
    texts = [b"", b" a", b"b", b"  "]
    assert "".join(map(decoder(texts, prefix_after=0).push, [1, 1, 0, 1, 1])) == " a aa a"
    assert "".join(map(decoder(texts, prefix_after=0, at_start=True).push, [1, 1])) == "a a"
    assert "".join(map(decoder(texts, prefix_after=0, at_start=True).push, [0, 3, 1])) == "  a"
    assert "".join(map(decoder(texts, prefix_after=0, at_start=True).push, [2, 1])) == "b a"


def test_the_longest_special_token_is_found_first():
    pattern = special_pattern(["<a>", "<a>b", "", "[.]"])
    assert pattern.split("<a><a>bx[.]x[y]") == ["", "<a>", "", "<a>b", "x", "[.]", "x[y]"]
    assert special_pattern([]).split("any") == ["any"]


@given(st.lists(st.text(max_size=3), max_size=4), st.text(max_size=20))
def test_splitting_by_special_tokens_keeps_the_text(tokens, text):
    parts = special_pattern(tokens).split(text)
    assert "".join(parts) == text
    assert all(part in tokens for part in parts[1::2])
