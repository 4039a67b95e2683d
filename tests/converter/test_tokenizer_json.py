import json
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from converter.tokenizer_json import parse_tokenizer_json, read_tokenizer_json
from dllama.errors import FormatError
from dllama.formats.vocabulary import ADDED, CONTROL, PreTokenizer, Vocabulary, parse_t, write_t
from dllama.tokenizer import MergeTokenizer, load_tokenizer
from tests.converter.corpus import CORPUS, NAMES, recorded

STYLES = {
    "llama3": PreTokenizer.LLAMA3,
    "qwen3": PreTokenizer.QWEN2,
    "gpt2": PreTokenizer.GPT2,
    "smollm": PreTokenizer.SMOLLM,
    "llama2": None,
    "metaspace_always": PreTokenizer.SPACE_ALWAYS,
    "metaspace_first": PreTokenizer.SPACE_FIRST,
    "metaspace_never": PreTokenizer.SPACE_NEVER,
}


@pytest.mark.parametrize("name", NAMES)
def test_encodes_as_the_library_did(tmp_path, name):
    values, ids = recorded(name)
    vocabulary = parse_tokenizer_json(values)
    assert vocabulary.pre_tokenizer is STYLES[name]
    write_t(tmp_path / "a.t", vocabulary)
    tokenizer = load_tokenizer(tmp_path / "a.t")
    assert {key: tokenizer.encode(text, special=True) for key, text in CORPUS.items()} == ids


@pytest.mark.parametrize("name", NAMES)
def test_any_text_encodes_as_the_library_does(name):
    tokenizers = pytest.importorskip("tokenizers")
    values, _ = recorded(name)
    library = tokenizers.Tokenizer.from_str(json.dumps(values))
    tokenizer = MergeTokenizer(parse_tokenizer_json(values))
    rng = random.Random(0)
    often = list(" \n\t\r'aAsStTlLdDmMvVeErR019.,!é世ſ½Ⅷ\x85\u00a0\u2003\u0301<|>_-\u2581🔶\u200d\x00\x1c")
    often += ["'s", "'LL", "  ", "\n\n", "the ", " the", *(token["content"] for token in values["added_tokens"])]
    for _ in range(2000):
        text = "".join(rng.choices(often, k=rng.randrange(40)))
        text += "".join(chr(rng.randrange(32, 0x500)) for _ in range(rng.randrange(10)))
        assert tokenizer.encode(text, special=True) == library.encode(text).ids, ascii(text)


@pytest.mark.parametrize("name", ["llama3", "qwen3"])
def test_files_of_distributed_llama_s_converter_encode_alike(name):
    """They name no pre-tokenizer, score every token by its id, and know specials by their place only."""
    values, ids = recorded(name)
    vocabulary = parse_tokenizer_json(values)
    theirs = Vocabulary(
        vocabulary.pieces, [-float(i) for i in range(len(vocabulary.pieces))], vocabulary.bos_id, (),
        add_bos=vocabulary.add_bos,
    )  # fmt: skip
    tokenizer = MergeTokenizer(theirs)
    assert {key: tokenizer.encode(text, special=True) for key, text in CORPUS.items()} == ids


def test_special_tokens_are_text_unless_asked_for():
    tokenizer = MergeTokenizer(parse_tokenizer_json(recorded("qwen3")[0]))
    text = "<|im_start|>user\n<think>x</think>"
    plain, special = tokenizer.encode(text), tokenizer.encode(text, special=True)
    assert len(plain) > len(special)
    assert tokenizer.decode(plain) == text
    assert tokenizer.decode(special) == "user\n<think>x</think>"  # think is an added token, and no special one


def test_ids_and_templates():
    values, _ = recorded("qwen3")
    first = len(values["model"]["vocab"])
    vocabulary = parse_tokenizer_json(values, size=first + 8)
    assert vocabulary.pieces[first:] == [
        b"<|endoftext|>", b"<|im_start|>", b"<|im_end|>", b"<think>", b"</think>",
        b"[PAD%d]" % (first + 5), b"[PAD%d]" % (first + 6), b"[PAD%d]" % (first + 7),
    ]  # fmt: skip
    assert vocabulary.scores[first:] == [CONTROL] * 3 + [ADDED] * 2 + [CONTROL] * 3
    assert (vocabulary.bos_id, vocabulary.add_bos) == (first, False)
    assert parse_tokenizer_json(values, bos="<|im_start|>").bos_id == first + 1
    assert parse_tokenizer_json(values, bos=first + 2).bos_id == first + 2
    assert parse_tokenizer_json(recorded("llama3")[0]).add_bos


def test_a_t_file_keeps_what_the_scores_say(tmp_path):
    vocabulary = parse_tokenizer_json(recorded("qwen3")[0])
    write_t(tmp_path / "a.t", vocabulary)
    assert parse_t((tmp_path / "a.t").read_bytes()) == vocabulary


def changed(name: str, **changes) -> dict:
    """A recorded tokenizer.json with other values at paths such as model__type."""
    values, _ = recorded(name)
    for path, value in changes.items():
        *parents, key = path.split("__")
        inner = values
        for parent in parents:
            inner = inner[int(parent) if parent.isdigit() else parent]
        inner[int(key) if key.isdigit() else key] = value
    return values


SPACE = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
SOUGHT = {"added_tokens__1__normalized": True, "added_tokens__1__special": False}
SPACED = {"added_tokens__1__content": "a b", **SOUGHT}


def without_bytes(**changes) -> dict:
    """Llama 2's kind, whose unknown characters have no bytes' pieces to become."""
    values = changed("llama2", **changes)
    tokens = [token for token in values["model"]["vocab"] if not token.startswith("<0x")]
    values["model"]["vocab"] = {token: i for i, token in enumerate(tokens)}
    return values


AS_IN_THE_LIBRARY = {
    "normalised, by nothing": changed("gpt2", added_tokens__0__normalized=True),
    "normalised, by a Metaspace": changed("metaspace_first", added_tokens__1__normalized=True),
    "normalised to the same": changed("qwen3", added_tokens__3__normalized=True),
    "spaces replaced": changed(
        "metaspace_never", normalizer=SPACE, pre_tokenizer=None, added_tokens__1__normalized=True
    ),
    "unknown characters": without_bytes(model__byte_fallback=False),
    "byte_fallback without bytes": without_bytes(),
}


@pytest.mark.parametrize("case", AS_IN_THE_LIBRARY)
def test_what_is_not_refused_encodes_as_in_the_library(case):
    tokenizers = pytest.importorskip("tokenizers")
    values = AS_IN_THE_LIBRARY[case]
    library = tokenizers.Tokenizer.from_str(json.dumps(values))
    tokenizer = MergeTokenizer(parse_tokenizer_json(values))
    for key, text in CORPUS.items():
        assert tokenizer.encode(text, special=True) == library.encode(text).ids, key


def test_special_tokens_that_are_normalised():
    """As in early conversions of LLaMA: they are found wherever they are spelled."""
    plain, said = (
        parse_tokenizer_json(changed("llama2", added_tokens__1__normalized=is_so)) for is_so in (False, True)
    )
    assert said == plain


@pytest.mark.parametrize("changes", [SOUGHT, {"model__byte_fallback": False}], ids=["normalised", "no bytes"])
def test_what_is_refused_encodes_otherwise_in_the_library(changes):
    tokenizers = pytest.importorskip("tokenizers")
    _, ids = recorded("llama2")
    library = tokenizers.Tokenizer.from_str(json.dumps(changed("llama2", **changes)))
    assert any(library.encode(text).ids != ids[key] for key, text in CORPUS.items())


@pytest.mark.parametrize(
    "values, reason",
    [
        ({}, "model is missing"),
        ({"model": []}, "model is not an object"),
        (changed("llama3", model__type="Unigram"), "a Unigram model is not supported"),
        (changed("llama3", model__end_of_word_suffix="</w>"), "end_of_word_suffix"),
        (changed("llama3", model__vocab=None), "vocab is missing"),
        (changed("llama3", model__vocab={"a": 0, "b": 0}), "ids are not numbers that differ"),
        (changed("llama3", model__vocab={"a": -1}), "ids are not numbers that differ"),
        (changed("llama3", model__merges=None), "merges is missing"),
        (changed("llama3", model__merges=["a"]), "merge 0 is 'a', not a pair"),
        (changed("llama3", model__merges=[["a", "\u2603"]]), "which is no token"),
        (changed("llama3", model__vocab__qqqq=3000), "token ids up to 3000"),
        (changed("llama3", **{"model__vocab__\u2603": 706}), "not of the byte-level alphabet"),
        (changed("llama3", normalizer={"type": "NFC"}), "of another family"),
        (changed("qwen3", normalizer=None), "of another family"),
        (changed("qwen3", pre_tokenizer__pretokenizers__0__pattern__Regex=r"\w+"), "of another family"),
        (changed("qwen3", pre_tokenizer__pretokenizers={}), "pre_tokenizer is not a sequence"),
        (changed("qwen3", model__ignore_merges=True), "ignore_merges"),
        (changed("gpt2", pre_tokenizer__add_prefix_space=True), "of another family"),
        (changed("llama2", normalizer={"type": "NFKC"}), "are not supported together"),
        (changed("llama2", normalizer=5), "normalizer is not an object"),
        (changed("metaspace_first", pre_tokenizer__split=True), "a Metaspace that splits"),
        (changed("metaspace_first", pre_tokenizer__prepend_scheme="x"), "prepend_scheme x is not known"),
        (changed("qwen3", added_tokens__0__lstrip=True), "has lstrip, which a .t file cannot say"),
        (changed("qwen3", added_tokens__0__id=-1), "has id -1"),
        (changed("qwen3", added_tokens=[1]), "added_tokens is not a list of objects"),
        (changed("metaspace_first", pre_tokenizer__prepend_scheme=[]), r"prepend_scheme \[\] is not known"),
        (changed("llama2", model__vocab={"<unk>": 0}, model__merges=[], added_tokens=[]), "bos id 1 is outside"),
        (changed("llama2", **SOUGHT), "'<s>' is sought in the normalised text"),
        (changed("metaspace_never", normalizer=SPACE, pre_tokenizer=None, **SPACED), "'a b' is sought"),
        (changed("qwen3", added_tokens__3__content="<thé>", added_tokens__3__normalized=True), "'<thé>' is sought"),
        (changed("llama2", model__byte_fallback=False), "byte_fallback is not true"),
        (changed("llama2", **{"model__vocab__<0x41>": 700}), "byte pieces that are not all there, or not in a row"),
        (without_bytes(model__byte_fallback=False, model__fuse_unk=False), "something else than one <unk>"),
        (without_bytes(model__unk_token=None), "something else than one <unk>"),
        (without_bytes(model__unk_token="<s>"), "something else than one <unk>"),
    ],
)
def test_refused_with_the_reason(tmp_path, values, reason):
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(FormatError, match=f"tokenizer.json: .*{reason}"):
        read_tokenizer_json(tmp_path / "tokenizer.json")


def test_arguments_refused_with_the_reason():
    values, _ = recorded("qwen3")
    for size in (700, 1 << 30):
        with pytest.raises(ValueError, match=f"705 tokens, and the model has {size:,}: they do not belong together"):
            parse_tokenizer_json(values, size=size)
    with pytest.raises(ValueError, match="bos token '<x>' is no token"):
        parse_tokenizer_json(values, bos="<x>")


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 800) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
PLACES = [
    *("model", "model__vocab", "model__merges", "normalizer", "pre_tokenizer", "post_processor", "added_tokens"),
    *("pre_tokenizer__pretokenizers__0", "pre_tokenizer__pretokenizers__0__pattern", "post_processor__processors__1"),
    *("post_processor__processors__1__single", "post_processor__processors__1__special_tokens", "added_tokens__0"),
    *("added_tokens__0__id", "added_tokens__0__content", "added_tokens__0__normalized", "model__merges__0"),
    *("pre_tokenizer__pretokenizers__0__pattern__Regex", "post_processor__processors__1__single__0__SpecialToken"),
    *("post_processor__processors__1__single__0__SpecialToken__id", "model__unk_token", "model__byte_fallback"),
    "post_processor__processors__1__special_tokens__<|begin_of_text|>",
]


@given(st.sampled_from(PLACES), JSON)
def test_any_value_anywhere_gives_a_vocabulary_or_a_value_error(place, value):
    try:
        vocabulary = parse_tokenizer_json(changed("llama3", **{place: value}))
    except ValueError:
        return
    assert len(vocabulary.pieces) <= 1600
