import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.errors import FileError, FormatError
from dllama.formats.vocabulary import (
    ADDED,
    CONTROL,
    KEYS,
    OLD_T_MAGIC,
    T_MAGIC,
    UNMERGED,
    PreTokenizer,
    Vocabulary,
    parse_bin,
    parse_t,
    read_bin,
    read_t,
    tokenizer_kind,
    write_bin,
    write_t,
)

PIECES = [b"<unk>", b"\n<s>\n", b"\n</s>\n", b"a", b"", "é".encode()]
SCORES = [0.0, 0.0, 0.0, -1.0, -2.5, -3.0]
SMALL = Vocabulary(PIECES, SCORES, bos_id=1, eos_ids=(2,))


def records(pieces=PIECES, scores=SCORES) -> bytes:
    return b"".join(struct.pack("<fI", score, len(piece)) + piece for score, piece in zip(scores, pieces, strict=True))


def t_file(pairs: dict | list, tail: bytes) -> bytes:
    """A `.t` file of these header pairs; names or numbers as keys."""
    pairs = pairs.items() if isinstance(pairs, dict) else pairs
    body = b"".join(struct.pack("<ii", KEYS.index(k) if isinstance(k, str) else k, v) for k, v in pairs)
    return struct.pack("<ii", T_MAGIC, 8 + len(body)) + body + tail


@pytest.mark.parametrize("template", [None, "{{ messages }} é"])
@pytest.mark.parametrize("bos_id", [None, 1])
@pytest.mark.parametrize("eos_ids", [(), (2,), (2, 3, 5)])
@pytest.mark.parametrize("add_bos", [True, False])
def test_t_round_trip(tmp_path, template, bos_id, eos_ids, add_bos):
    vocabulary = Vocabulary(PIECES, SCORES, bos_id, eos_ids, add_bos, template)
    write_t(tmp_path / "a.t", vocabulary)
    assert read_t(tmp_path / "a.t") == vocabulary


def test_bin_round_trip(tmp_path):
    write_bin(tmp_path / "tokenizer.bin", SMALL)
    assert (tmp_path / "tokenizer.bin").read_bytes() == struct.pack("<I", 6) + records()
    assert read_bin(tmp_path / "tokenizer.bin") == SMALL
    with pytest.raises(ValueError, match="must be 1 and 2"):
        write_bin(tmp_path / "b.bin", Vocabulary(PIECES, SCORES, 0, (2,)))


def test_a_written_t_file_is_the_format_to_the_byte(tmp_path):
    write_t(tmp_path / "a.t", Vocabulary(PIECES, SCORES, 1, (2, 3), chat_template="hi"))
    header = {
        "version": 1, "vocab_size": 6, "max_token_bytes": 6, "bos_id": 1, "chat_template_bytes": 2, "n_eos_ids": 2,
        "add_bos": 1,
    }  # fmt: skip
    assert (tmp_path / "a.t").read_bytes() == t_file(header, b"hi" + struct.pack("<ii", 2, 3) + records())


@pytest.mark.parametrize("pre_tokenizer", PreTokenizer)
def test_a_pre_tokenizer_is_named_where_others_keep_a_pad_id(tmp_path, pre_tokenizer):
    vocabulary = Vocabulary(PIECES, SCORES, 1, (2,), pre_tokenizer=pre_tokenizer)
    write_t(tmp_path / "a.t", vocabulary)
    header = {**HEADER, "pad_id": int(pre_tokenizer), "n_eos_ids": 1, "add_bos": 1}
    assert (tmp_path / "a.t").read_bytes() == t_file(header, struct.pack("<i", 2) + records())
    assert read_t(tmp_path / "a.t") == vocabulary
    assert pre_tokenizer.byte_level == (pre_tokenizer.name in ("LLAMA3", "QWEN2", "GPT2", "SMOLLM"))


def test_scores_that_say_what_a_piece_is_survive_float32():
    assert [struct.unpack("<f", struct.pack("<f", score))[0] for score in (UNMERGED, ADDED, CONTROL)] == [
        UNMERGED,
        ADDED,
        CONTROL,
    ]


def test_the_older_header():
    data = struct.pack("<6i", OLD_T_MAGIC, 6, 6, 1, 2, -1) + records()
    assert parse_t(data) == SMALL


def test_legacy_keys():
    legacy = {"version": 0, "vocab_size": 6, "max_token_bytes": 6, "bos_id": 1, "eos_id": 2, "pad_id": -1}
    assert parse_t(t_file(legacy, records())) == SMALL
    chat = {**legacy, "chat_eos_id": 3, "chat_template_bytes": 2, "chat_stop_bytes": 3}
    vocabulary = parse_t(t_file(chat, b"hi" + b"end" + records()))
    assert (vocabulary.eos_ids, vocabulary.chat_template) == ((2, 3), "hi")
    both = {**legacy, "chat_eos_id": 2, "n_eos_ids": 1}
    assert parse_t(t_file(both, struct.pack("<i", 3) + records())).eos_ids == (3, 2)
    none = {**legacy, "bos_id": -1, "eos_id": -1}
    assert (parse_t(t_file(none, records())).bos_id, parse_t(t_file(none, records())).eos_ids) == (None, ())


HEADER = {"version": 1, "vocab_size": 6, "max_token_bytes": 6, "bos_id": 1}


@pytest.mark.parametrize(
    "data, reason",
    [
        (b"", "not a tokenizer: 0 bytes"),
        (bytes(8), "not a .t tokenizer: it starts with 0x00000000"),
        (struct.pack("<3i", OLD_T_MAGIC, 6, 6), "not a tokenizer: 12 bytes"),
        (struct.pack("<2i", T_MAGIC, 1 << 30), "header size 1073741824"),
        (struct.pack("<2i", T_MAGIC, -8), "header size -8"),
        (struct.pack("<2i", T_MAGIC, 48), "not a tokenizer: 8 bytes"),
        (t_file({**HEADER, 11: 0}, records()), "unknown header key 11"),
        (t_file([*HEADER.items(), ("bos_id", 1)], records()), r"key 3 \(bos_id\) appears twice"),
        (t_file({**HEADER, "pad_id": -110}, records()), "pre-tokenizer of number -110, which is not known"),
        (t_file({**HEADER, "version": 2}, records()), "header version 2"),
        (t_file({**HEADER, "vocab_size": 0}, b""), "a vocabulary of no tokens"),
        (t_file({**HEADER, "vocab_size": -1}, records()), "vocab_size is -1"),
        (t_file({**HEADER, "vocab_size": 2**31 - 1}, records()), "truncated: 2147483647 tokens do not fit"),
        (t_file({**HEADER, "vocab_size": 5}, records()), "oversized"),
        (t_file({**HEADER, "vocab_size": 7}, records()), "truncated at token 6"),
        (t_file(HEADER, records()[:-1]), "truncated: token 5 has 2 bytes, 1 are left"),
        (t_file({**HEADER, "bos_id": 6}, records()), "bos id 6 is outside the vocabulary of 6"),
        (t_file({**HEADER, "eos_id": 6}, records()), "eos id 6 is outside"),
        (t_file({**HEADER, "n_eos_ids": 1}, struct.pack("<i", -3) + records()), "eos id -3 is outside"),
        (t_file({**HEADER, "n_eos_ids": 2**31 - 1}, records()), "truncated: eos ids"),
        (t_file({**HEADER, "chat_template_bytes": 2**31 - 1}, records()), "truncated: chat template"),
        (t_file({**HEADER, "chat_template_bytes": -1}, records()), "chat_template_bytes is -1"),
        (t_file({**HEADER, "chat_template_bytes": 1}, b"\xff" + records()), "not valid UTF-8"),
        (t_file(HEADER, records(scores=[float("nan")] * 6)), "score is not a finite number"),
    ],
)
def test_t_refused_with_the_reason(data, reason):
    with pytest.raises(ValueError, match=reason):
        parse_t(data)


@pytest.mark.parametrize(
    "data, reason",
    [
        (struct.pack("<I", 0) + records(), "longest token has 0 bytes"),
        (struct.pack("<I", 5) + records(), "token 2 has 6 bytes, and the longest is said 5"),
        (struct.pack("<I", 6) + records()[:-1], "truncated"),
        (struct.pack("<I", 6) + records() + b"x", "truncated at token 6"),
        (struct.pack("<I", 6) + struct.pack("<fi", 0, -1), "truncated: token 0 has 4294967295 bytes"),
        (struct.pack("<I", 6) + records()[:13], "bos id 1 is outside the vocabulary"),
        (struct.pack("<I", 6), "a vocabulary of no tokens"),
    ],
)
def test_bin_refused_with_the_reason(data, reason):
    with pytest.raises(ValueError, match=reason):
        parse_bin(data)


@given(st.binary(max_size=200), st.sampled_from([b"", struct.pack("<i", T_MAGIC), struct.pack("<i", OLD_T_MAGIC)]))
def test_any_bytes_give_a_value_error(tail, magic):
    for parse in (parse_t, parse_bin):
        with pytest.raises(ValueError):
            parse(magic + tail)


@given(st.dictionaries(st.integers(-1, 12), st.integers(-10, 80)), st.binary(max_size=12))
def test_any_header_gives_a_vocabulary_or_a_value_error(pairs, tail):
    known = {KEYS.index(name): value for name, value in HEADER.items()}
    try:
        vocabulary = parse_t(t_file({**known, **pairs}, tail + records()))
    except ValueError:
        return
    assert sum(map(len, vocabulary.pieces)) <= len(tail) + len(records())


@pytest.mark.parametrize(
    "head, kind",
    [
        (struct.pack("<i", T_MAGIC), "t"),
        (struct.pack("<i", OLD_T_MAGIC), "t"),
        (b"\n\x0e\n\x05<unk>", "sentencepiece"),
        (struct.pack("<I", 10), "bin"),
        (struct.pack("<I", 27), "bin"),
    ],
)
def test_kinds(head, kind):
    assert tokenizer_kind(head) == kind


@pytest.mark.parametrize(
    "head, reason",
    [
        (struct.pack("<i", 0x0A00ABCD), "a model, not a tokenizer"),
        (b' {"version"', "a tokenizer.json, which dllama-convert"),
        (b"", "neither .t, SentencePiece nor llama2.c's"),
        (b"IQ== 0\n", "neither .t"),
    ],
)
def test_kinds_of_other_files(head, reason):
    with pytest.raises(ValueError, match=reason):
        tokenizer_kind(head)


def test_readers_name_the_file(tmp_path):
    with pytest.raises(FileError, match="missing.t: no such file"):
        read_t(tmp_path / "missing.t")
    (tmp_path / "a.t").write_bytes(b"12345678")
    with pytest.raises(FormatError, match="a.t: not a .t tokenizer"):
        read_t(tmp_path / "a.t")
