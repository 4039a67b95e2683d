import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.byte_alphabet import from_alphabet, to_alphabet


def test_known_characters():
    assert to_alphabet(b" the\n") == "\u0120the\u010a"  # the two that everyone has seen
    assert to_alphabet("é".encode()) == "\u00c3\u00a9"
    assert to_alphabet(bytes(range(256))).isprintable()


@given(st.binary(max_size=20))
def test_round_trip(piece):
    assert from_alphabet(to_alphabet(piece)) == piece


def test_other_characters():
    with pytest.raises(ValueError, match="has '世', which is not of the byte-level alphabet"):
        from_alphabet("a世")
