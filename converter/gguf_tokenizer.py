"""The tokenizer in a GGUF file, to and from a Vocabulary.

GGUF calls SentencePiece's kind "llama" and byte-level BPE "gpt2", whose pre-tokenizer it names.
"""

import os

import numpy as np

from converter import gguf_file
from converter.byte_alphabet import from_alphabet, to_alphabet
from converter.merges import merge_list, merge_scores
from converter.values import flag, text
from dllama.errors import FormatError
from dllama.formats.vocabulary import ADDED, CONTROL, PreTokenizer, Vocabulary
from dllama.tokenizer.merge import MergeTokenizer

META_SPACE = "\u2581"
NORMAL, UNKNOWN, CONTROL_TYPE, USER_DEFINED, UNUSED, BYTE = range(1, 7)

PRE_TOKENIZERS = {
    "llama-bpe": PreTokenizer.LLAMA3,
    "llama3": PreTokenizer.LLAMA3,
    "llama-v3": PreTokenizer.LLAMA3,
    "qwen2": PreTokenizer.QWEN2,
    "deepseek-r1-qwen": PreTokenizer.QWEN2,
    "gpt-2": PreTokenizer.GPT2,
    "smollm": PreTokenizer.SMOLLM,
}
"""GGUF's names; the first of several is the one to write."""

KEY = "tokenizer.ggml."
EOS_KEYS = ("eos_token_id", "eot_token_id", "eom_token_id")
ENDS = ("<|eot_id|>", "<|eom_id|>", "<|im_end|>")
"""Special tokens that end a turn whether a file says so or not, as llama.cpp has it."""


def read_gguf_tokenizer(path: str | os.PathLike) -> Vocabulary:
    """The vocabulary in a GGUF file; FormatError where there is none that a `.t` file can hold."""
    metadata, _ = gguf_file.read_gguf(path)
    try:
        return parse_gguf_tokenizer(metadata)
    except ValueError as error:
        raise FormatError(path, str(error)) from None


def parse_gguf_tokenizer(metadata: dict) -> Vocabulary:
    """As ``read_gguf_tokenizer``, from the file's metadata. ValueError with the reason."""
    kind = text(metadata, f"{KEY}model")
    if kind not in ("llama", "gpt2"):
        raise ValueError(f"tokenizer {kind} cannot be converted (known: llama, gpt2)")
    tokens = metadata.get(f"{KEY}tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise ValueError(f"{KEY}tokens is missing or not a list of strings")
    types = _numbers(metadata, "token_type", len(tokens), NORMAL).astype(int).tolist()
    if kind == "llama":
        style = None if flag(metadata, f"{KEY}add_space_prefix", True) else PreTokenizer.SPACE_NEVER
        if flag(metadata, f"{KEY}remove_extra_whitespaces", False):
            raise ValueError("the tokenizer trims spaces, which a .t file cannot say")
        pieces = [token.replace(META_SPACE, " ").encode() for token in tokens]
        scores = _numbers(metadata, "scores", len(tokens), 0.0).astype(float).tolist()
    else:
        style = _pre_tokenizer(metadata)
        pieces = [
            from_alphabet(token) if type_ == NORMAL else token.encode()
            for token, type_ in zip(tokens, types, strict=True)
        ]
        merges = metadata.get(f"{KEY}merges")
        if not isinstance(merges, list):
            raise ValueError(f"{KEY}merges is missing")
        normal = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
        merged = merge_scores(merges, normal)
        scores = [merged.get(i, 0.0) for i in range(len(tokens))]
    for i, type_ in enumerate(types):
        if type_ in (CONTROL_TYPE, UNUSED):
            scores[i] = CONTROL
        elif type_ == USER_DEFINED:
            scores[i] = ADDED
    bos_id = _id(metadata, "bos_token_id")
    special = [i for i, type_ in enumerate(types) if type_ in (CONTROL_TYPE, USER_DEFINED)]
    begins = kind == "llama" or style is PreTokenizer.LLAMA3  # what llama.cpp does where the file does not say
    add_bos = flag(metadata, f"{KEY}add_bos_token", begins) and bos_id is not None
    if kind == "gpt2" and bos_id is None and special:
        bos_id = special[0]  # readers of byte-level files look for the special tokens from here on
    template = metadata.get("tokenizer.chat_template")
    eos_ids = [_id(metadata, key) for key in EOS_KEYS] + [i for i in special if tokens[i] in ENDS]
    return Vocabulary(
        pieces,
        scores,
        bos_id=bos_id,
        eos_ids=tuple(dict.fromkeys(i for i in eos_ids if i is not None)),
        add_bos=add_bos,
        chat_template=template if isinstance(template, str) else None,
        pre_tokenizer=style,
    )


def tokenizer_metadata(vocabulary: Vocabulary, size: int) -> dict[str, tuple]:
    """The metadata that describe a vocabulary, as ``gguf_file.header_bytes`` takes them.

    size: tokens of the model; where it has more than the vocabulary, the rest are unused
    ValueError for one that llama.cpp cannot run: a byte-level one whose pre-tokenizer is not known.
    """
    v, tokenizer = vocabulary, MergeTokenizer(vocabulary)
    tokens, types, own = (_byte_level if tokenizer.byte_level else _sentencepiece)(v, tokenizer)
    control, added = tokenizer.special_ids
    for i in control:
        types[i] = CONTROL_TYPE
    for i in added:
        types[i] = USER_DEFINED
    unused = range(len(tokens), size)
    ids = {"bos_token_id": v.bos_id, **dict(zip(EOS_KEYS, v.eos_ids, strict=False))}
    return {
        **own,
        f"{KEY}tokens": _array(gguf_file.STRING, [*tokens, *(f"[PAD{i}]" for i in unused)]),
        f"{KEY}scores": _array(gguf_file.F32, [*v.scores, *(CONTROL for _ in unused)]),
        f"{KEY}token_type": _array(gguf_file.I32, [*types, *(UNUSED for _ in unused)]),
        **{KEY + key: (gguf_file.U32, i) for key, i in ids.items() if i is not None},
        f"{KEY}add_bos_token": (gguf_file.BOOL, v.add_bos and v.bos_id is not None),
        **({"tokenizer.chat_template": (gguf_file.STRING, v.chat_template)} if v.chat_template else {}),
    }


def _byte_level(v: Vocabulary, tokenizer: MergeTokenizer) -> tuple[list[str], list[int], dict]:
    """Tokens, their types, and the metadata of this kind alone."""
    if tokenizer.pre_tokenizer is None:
        raise ValueError("the tokenizer's family is not known, and llama.cpp must be told how it cuts text into words")
    special = set.union(*tokenizer.special_ids)
    tokens = [
        piece.decode("utf-8", "replace") if i in special else to_alphabet(piece) for i, piece in enumerate(v.pieces)
    ]
    pairs = merge_list([b"" if i in special else piece for i, piece in enumerate(v.pieces)], v.scores)
    pre = next(name for name, style in PRE_TOKENIZERS.items() if style is tokenizer.pre_tokenizer)
    own = {
        f"{KEY}model": (gguf_file.STRING, "gpt2"),
        f"{KEY}pre": (gguf_file.STRING, pre),
        f"{KEY}merges": _array(gguf_file.STRING, [" ".join(map(to_alphabet, pair)) for pair in pairs]),
    }
    return tokens, [NORMAL] * len(tokens), own


def _sentencepiece(v: Vocabulary, tokenizer: MergeTokenizer) -> tuple[list[str], list[int], dict]:
    """As ``_byte_level``."""
    tokens = [piece.decode("utf-8", "replace").replace(" ", META_SPACE) for piece in v.pieces]
    types = [NORMAL] * len(tokens)
    first = tokenizer.first_byte
    if first is not None:
        tokens[first : first + 256] = [f"<0x{byte:02X}>" for byte in range(256)]
        types[first : first + 256] = [BYTE] * 256
    own = {
        f"{KEY}model": (gguf_file.STRING, "llama"),
        f"{KEY}pre": (gguf_file.STRING, "default"),
        f"{KEY}add_space_prefix": (gguf_file.BOOL, v.pre_tokenizer is not PreTokenizer.SPACE_NEVER),
    }
    if v.pieces[0] == b"<unk>":
        types[0] = UNKNOWN
        own[f"{KEY}unknown_token_id"] = gguf_file.U32, 0
    return tokens, types, own


def _array(kind: int, values: list) -> tuple:
    return gguf_file.ARRAY, kind, values


def _pre_tokenizer(metadata: dict) -> PreTokenizer:
    name = text(metadata, f"{KEY}pre")
    if name not in PRE_TOKENIZERS:
        raise ValueError(f"pre-tokenizer {name} is not known (known: {', '.join(PRE_TOKENIZERS)})")
    return PRE_TOKENIZERS[name]


def _numbers(metadata: dict, key: str, count: int, default: float) -> np.ndarray:
    """One number for each token."""
    values = metadata.get(KEY + key)
    if values is None:
        return np.full(count, default)
    kinds = "iu" if isinstance(default, int) else "iuf"
    if not isinstance(values, np.ndarray) or len(values) != count or values.dtype.kind not in kinds:
        raise ValueError(f"{KEY}{key} is not one {'whole ' * (kinds == 'iu')}number for each of {count:,} tokens")
    return values


def _id(metadata: dict, key: str) -> int | None:
    value = metadata.get(KEY + key)
    return value if type(value) is int else None
