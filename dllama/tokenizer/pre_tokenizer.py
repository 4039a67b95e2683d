"""Cutting a text into words before pieces are merged, as byte-level tokenizers do.

Their patterns use Unicode classes (``\\p{L}``, ``\\p{N}``) that Python's ``re`` lacks. So each character is first
replaced by one ASCII character that says its class, and the pattern runs over those: it finds spans of the text.
Characters that Unicode added after Python's tables or the original library's may be classed differently.

    a  letter; but those of the contractions ('s 't 're 've 'm 'll 'd) stand for themselves
    0  number
    n  carriage return or line feed;   _  space;   w  other white space
    '  apostrophe;   .  anything else
"""

import re
import unicodedata
from collections.abc import Iterator

from dllama.formats.vocabulary import PreTokenizer, Vocabulary

WHITE_SPACE = "\t\v\f\x85\xa0\u1680\u2028\u2029\u202f\u205f\u3000" + "".join(map(chr, range(0x2000, 0x200B)))
"""Unicode's White_Space but for the space and line ends; ``str.isspace`` counts four control characters more."""


class _Classes(dict):
    """code point -> the character that stands for its class, filled as characters come up."""

    def __missing__(self, code_point: int) -> str:
        category = unicodedata.category(chr(code_point))[0]
        kind = self[code_point] = {"L": "a", "N": "0"}.get(category, ".")
        return kind


SPELLED = {letter: letter for letter in "strevmld'"}
EITHER_CASE = {**SPELLED, **{letter.upper(): letter for letter in "strevmld"}, "\u017f": "s"}  # the long s folds to s
SPACES = {"\r": "n", "\n": "n", " ": "_", **dict.fromkeys(WHITE_SPACE, "w")}

LETTER, NUMBER, SPACE, OTHER = "[astrevmld]", "0", "[n_w]", "['.]"
CONTRACTION = "'(?:s|t|re|ve|m|ll|d)"
TRAILING_SPACE = f"{SPACE}+(?!{LETTER}|{NUMBER}|{OTHER})|{SPACE}+"  # \s+(?!\S)|\s+

# (?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+
# Llama 3 takes up to three digits as a word, Qwen one.
_CL100K = f"{CONTRACTION}|[_w'.]?{LETTER}+|{NUMBER}{{1,%d}}|_?{OTHER}+n*|{SPACE}*n+|{TRAILING_SPACE}"
# 's|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+
_GPT2 = f"{CONTRACTION}|_?{LETTER}+|_?{NUMBER}+|_?{OTHER}+|{TRAILING_SPACE}"
# The same between digits, each of which is cut off first: a space before one ends its part of the text.
_SMOLLM = f"{CONTRACTION}|_?{LETTER}+|{NUMBER}|_?{OTHER}+|{SPACE}+(?!{LETTER}|{OTHER})|{SPACE}+"

PATTERNS = {
    PreTokenizer.LLAMA3: (re.compile(_CL100K % 3), _Classes(str.maketrans({**EITHER_CASE, **SPACES}))),
    PreTokenizer.QWEN2: (re.compile(_CL100K % 1), _Classes(str.maketrans({**EITHER_CASE, **SPACES}))),
    PreTokenizer.GPT2: (re.compile(_GPT2), _Classes(str.maketrans({**SPELLED, **SPACES}))),
    PreTokenizer.SMOLLM: (re.compile(_SMOLLM), _Classes(str.maketrans({**SPELLED, **SPACES}))),
}


def words(text: str, pre_tokenizer: PreTokenizer) -> Iterator[str]:
    """The words of ``text``, which joined give it back; but Qwen's tokenizers compose it (NFC) first."""
    if pre_tokenizer is PreTokenizer.QWEN2:
        text = unicodedata.normalize("NFC", text)
    pattern, classes = PATTERNS[pre_tokenizer]
    for match in pattern.finditer(text.translate(classes)):
        yield text[match.start() : match.end()]


def recognise(vocabulary: Vocabulary) -> PreTokenizer | None:
    """The pre-tokenizer of a byte-level vocabulary whose file names none, told by the family's special tokens.

    Distributed Llama's converter writes such files; None for a family not known.
    """
    if vocabulary.bos_id is None:
        return None
    special = set(vocabulary.pieces[vocabulary.bos_id :])
    if special & {b"<|begin_of_text|>", b"<|reserved_special_token_0|>"}:
        return PreTokenizer.LLAMA3
    if special >= {b"<|endoftext|>", b"<|im_start|>"}:
        return PreTokenizer.QWEN2
    return None
