import pytest

from converter.merges import merge_list, merge_scores
from converter.tokenizer_json import parse_tokenizer_json
from dllama.formats.vocabulary import UNMERGED
from tests.converter.corpus import recorded


def test_scores_are_places_in_the_list():
    tokens = {"a": 0, "b": 1, "c": 2, "ab": 3, "abc": 4, "cab": 5}
    assert merge_scores(["a b", ["ab", "c"], "a bc"], tokens) == {3: -1.0, 4: -2.0, 5: UNMERGED}


@pytest.mark.parametrize("merges, reason", [(["ab"], "not a pair"), ([5], "not a pair"), ([["a", 1]], "not a pair"),
                                            (["b a"], "makes 'ba', which is no token")])  # fmt: skip
def test_lists_that_are_wrong(merges, reason):
    with pytest.raises(ValueError, match=reason):
        merge_scores(merges, {"a": 0, "b": 1, "ab": 2})


def test_pairs_come_best_first():
    pieces = [b"a", b"b", b"c", b"abc", b"bc", b"cc", b"acb"]
    scores = [0.0, 0.0, 0.0, -3.0, -1.0, UNMERGED, -2.0]
    assert merge_list(pieces, scores) == [(b"b", b"c"), (b"a", b"bc")]  # nothing reaches acb


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gpt2", "smollm"])
def test_a_list_comes_back_from_its_scores(name):
    values, _ = recorded(name)
    vocabulary = parse_tokenizer_json(values)
    normal = len(values["model"]["vocab"])
    pairs = merge_list(vocabulary.pieces[:normal], vocabulary.scores[:normal])
    from converter.byte_alphabet import to_alphabet

    assert [[to_alphabet(left), to_alphabet(right)] for left, right in pairs] == values["model"]["merges"]
