import numpy as np
import pytest
import sentencepiece

from converter.gguf_tokenizer import parse_gguf_tokenizer, read_gguf_tokenizer, tokenizer_metadata
from converter.sentencepiece_model import read_sentencepiece
from dllama.errors import FormatError
from dllama.formats.vocabulary import ADDED, CONTROL, UNMERGED, PreTokenizer, Vocabulary
from dllama.tokenizer import MergeTokenizer
from tests.converter.gguf_files import gguf_bytes
from tests.tokenizer.models import TEXTS, train

KEY = "tokenizer.ggml."
ALPHABET = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256), *range(256, 324))]
TOKENS = [*ALPHABET, "ab", "abc", "zz", "<|im_start|>", "<think>", "[PAD261]"]
BPE = {
    f"{KEY}model": "gpt2", f"{KEY}pre": "qwen2", f"{KEY}tokens": TOKENS, f"{KEY}merges": ["a b", "ab c"],
    f"{KEY}token_type": np.array([1] * 259 + [3, 4, 5], "<i4"), f"{KEY}eos_token_id": 259,
    "tokenizer.chat_template": "{{ x }}",
}  # fmt: skip


def test_byte_level_bpe(tmp_path):
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(BPE, {}))
    v = read_gguf_tokenizer(tmp_path / "a.gguf")
    assert v.pieces[256:] == [b"ab", b"abc", b"zz", b"<|im_start|>", b"<think>", b"[PAD261]"]
    assert v.scores[256:] == [-1.0, -2.0, UNMERGED, CONTROL, ADDED, CONTROL]
    assert (v.pre_tokenizer, v.eos_ids, v.chat_template) == (PreTokenizer.QWEN2, (259,), "{{ x }}")
    assert (v.bos_id, v.add_bos) == (259, False)  # it has none: other readers look for the special tokens from here on


def test_every_end_of_a_turn():
    v = parse_gguf_tokenizer({**BPE, f"{KEY}eot_token_id": 260, f"{KEY}eom_token_id": 259, f"{KEY}bos_token_id": 259})
    assert (v.eos_ids, v.bos_id, v.add_bos) == ((259, 260), 259, False)
    assert parse_gguf_tokenizer({**BPE, f"{KEY}bos_token_id": 259, f"{KEY}add_bos_token": True}).add_bos
    named = [*TOKENS[:-3], "<|im_end|>", "<|eot_id|>", "x"]
    types = np.array([1] * 259 + [3, 3, 1], "<i4")
    assert parse_gguf_tokenizer({**BPE, f"{KEY}tokens": named, f"{KEY}token_type": types}).eos_ids == (259, 260)


def test_whether_a_text_begins_with_bos_where_the_file_does_not_say():
    bos = {f"{KEY}bos_token_id": 259}
    assert not parse_gguf_tokenizer({**BPE, **bos}).add_bos
    assert parse_gguf_tokenizer({**BPE, **bos, f"{KEY}pre": "llama-bpe"}).add_bos
    assert not parse_gguf_tokenizer({**BPE, f"{KEY}pre": "llama-bpe"}).add_bos


def test_sentencepiece_s_kind(tmp_path):
    path = train(tmp_path / "tokenizer.model", vocab_size=400)
    library = sentencepiece.SentencePieceProcessor(model_file=str(path))
    before = read_sentencepiece(path)
    metadata = {key: value for key, (_, *values) in tokenizer_metadata(before, 405).items() for value in values[-1:]}
    for key, dtype in (("scores", "<f4"), ("token_type", "<i4")):
        metadata[KEY + key] = np.array(metadata[KEY + key], dtype)
    assert metadata[f"{KEY}tokens"][:400] == library.id_to_piece(list(range(400)))
    after = parse_gguf_tokenizer(metadata)
    assert after.pieces == [*before.pieces, *(b"[PAD%d]" % i for i in range(400, 405))]
    assert (after.bos_id, after.eos_ids, after.add_bos) == (1, (2,), True)
    tokenizer = MergeTokenizer(after)
    for text in TEXTS:
        assert tokenizer.encode(text, bos=False) == library.encode(text)


@pytest.mark.parametrize(
    "changes, reason",
    [
        ({"model": "bert"}, "tokenizer bert cannot be converted"),
        ({"model": None}, "tokenizer None cannot be converted"),
        ({"model": ["llama"]}, "tokenizer.ggml.model is not text"),
        ({"model": np.zeros(2, "<i4")}, "tokenizer.ggml.model is not text"),
        ({"pre": ["qwen2"]}, "tokenizer.ggml.pre is not text"),
        ({"add_bos_token": np.zeros(2, "<i4")}, "tokenizer.ggml.add_bos_token is neither true nor false"),
        ({"model": "llama", "add_space_prefix": ["a"]}, "add_space_prefix is neither true nor false"),
        ({"model": "llama", "remove_extra_whitespaces": "a"}, "remove_extra_whitespaces is neither true nor false"),
        ({"token_type": np.full(262, np.nan, "<f4")}, "not one whole number for each of 262 tokens"),
        ({"tokens": None}, "tokens is missing"),
        ({"tokens": np.zeros(3, "<i4")}, "tokens is missing or not a list of strings"),
        ({"pre": "tekken"}, "pre-tokenizer tekken is not known"),
        ({"pre": None}, "pre-tokenizer None is not known"),
        ({"merges": None}, "merges is missing"),
        ({"merges": ["a"]}, "merge 0 is 'a', not a pair"),
        ({"merges": ["b a"]}, "which is no token"),
        ({"token_type": np.ones(5, "<i4")}, "not one whole number for each of 262 tokens"),
        ({"token_type": np.ones(262, "<i4"), "tokens": [*TOKENS[:-1], "世"]}, "not of the byte-level alphabet"),
        ({"eos_token_id": 262}, "eos id 262 is outside the vocabulary"),
        ({"model": "llama", "remove_extra_whitespaces": True}, "trims spaces"),
        ({"model": "llama", "scores": np.array([np.nan] * 262, "<f4")}, "score is not a finite number"),
    ],
)
def test_refused_with_the_reason(tmp_path, changes, reason):
    metadata = {**BPE, **{KEY + key: value for key, value in changes.items()}}
    path = tmp_path / "a.gguf"
    path.write_bytes(gguf_bytes({key: value for key, value in metadata.items() if value is not None}, {}))
    with pytest.raises(FormatError, match=f"a.gguf: .*{reason}"):
        read_gguf_tokenizer(path)


def test_byte_pieces_that_are_stored_as_bytes_are_spelled():
    pieces = [b"<unk>", b"<s>", b"</s>", *(bytes([byte]) for byte in range(256)), b" a"]
    metadata = tokenizer_metadata(Vocabulary(pieces, [0.0] * 260, 1, (2,)), 260)
    tokens, types = metadata[f"{KEY}tokens"][2], metadata[f"{KEY}token_type"][2]
    assert tokens[:4] == ["<unk>", "<s>", "</s>", "<0x00>"] and tokens[-2:] == ["<0xFF>", "\u2581a"]
    assert types == [2, 3, 3, *[6] * 256, 1]
