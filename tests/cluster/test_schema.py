import math

import pytest

from dllama.cluster.schema import boolean, data, integer, listing, mapping, one_of, optional, real, row, span, text
from dllama.formats import FloatType


@pytest.mark.parametrize(
    "checker, sound, wrong",
    [
        (integer(1, 9), (1, 9), (0, 10, True, 1.0, "1", None, 1 << 200)),
        (real(0, 1), (0, 1, 0.5), (-0.1, 1.1, math.nan, math.inf, True, "0", None)),
        (real(0, math.inf), (1e308,), (math.inf,)),
        (boolean, (True, False), (0, 1, None, "True")),
        (text(3), ("", "a b", "äöü"), ("abcd", "a\n", "\x1b[m", "\u202e", b"abc", None)),
        (data(2), (b"ab",), (b"a", b"abc", "ab", None)),
        (one_of("root", 3), ("root", 3), ("Root", 3.0, True, None, [])),
        (one_of(FloatType.F32, FloatType.Q80), (0, 3), (1, False, 3.0, "F32", {})),
        (optional(integer(0, 1)), (None, 0), (2, False)),
        (listing(integer(0, 1), 2), ([], (0, 1), [1]), ([0, 0, 0], [2], "01", {0: 1}, None)),
        (row(integer(0, 1), text(1)), ([0, "a"], (1, "")), ([0], [0, "a", 0], ["a", 0], None)),
        (span(5), ([0, 5], (3, 3)), ([5, 0], [0, 6], [-1, 2], [1], None)),
        (mapping({"a": integer(0, 1)}), ({"a": 1},), ({}, {"a": 2}, {"a": 1, "b": 1}, {b"a": 1}, [["a", 1]], None)),
    ],
)
def test_what_passes_and_what_does_not(checker, sound, wrong):
    assert [value for value in sound if checker(value)] == []
    assert [value for value in wrong if not checker(value)] == []


@pytest.mark.parametrize("value", ["x" * 10**6, [["x"] * 1000] * 1000, {i: "x" * 1000 for i in range(1000)}])
def test_what_is_said_of_a_large_value_is_short(value):
    for checker in (integer(0, 1), text(1), data(1), one_of(1), row(integer(0, 1)), mapping({"a": boolean})):
        assert len(checker(value)) < 500
