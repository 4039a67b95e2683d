"""Text to token ids and back."""

import os

from dllama.errors import FormatError
from dllama.formats.vocabulary import parse_bin, parse_t, read_small_file, tokenizer_kind
from dllama.tokenizer.base import StreamDecoder, Tokenizer
from dllama.tokenizer.merge import MergeTokenizer
from dllama.tokenizer.sentence_piece import SentencePieceTokenizer

__all__ = ["MergeTokenizer", "SentencePieceTokenizer", "StreamDecoder", "Tokenizer", "load_tokenizer"]


def load_tokenizer(path: str | os.PathLike) -> Tokenizer:
    """The tokenizer in a `.t` file, a SentencePiece `tokenizer.model` or a llama2.c `tokenizer.bin`.

    The kind is told by the content, whatever the file's name. Raises FileError where the file cannot be read,
    FormatError where it is none of the three or damaged.
    """
    data = read_small_file(path)
    try:
        return _parse(data)
    except ValueError as error:
        raise FormatError(path, str(error)) from None


def _parse(data: bytes) -> Tokenizer:
    kind = tokenizer_kind(data)
    if kind == "sentencepiece":
        return SentencePieceTokenizer(data)
    return MergeTokenizer(parse_t(data) if kind == "t" else parse_bin(data))
