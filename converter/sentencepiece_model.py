"""SentencePiece `tokenizer.model` -> Vocabulary.

The file is a protobuf message (sentencepiece_model.proto in the SentencePiece sources). Only what a vocabulary needs is
read, and what merging by score cannot reproduce is refused.
"""

import os
import struct
from collections import Counter
from collections.abc import Iterator

from dllama.errors import FormatError
from dllama.formats.vocabulary import CONTROL, PreTokenizer, Vocabulary, read_small_file

META_SPACE = "\u2581"

# Field numbers of ModelProto, then of the messages in it.
PIECE, TRAINER, NORMALIZER = 1, 2, 3
PIECE_TEXT, PIECE_SCORE, PIECE_KIND = 1, 2, 3
TRAINER_KIND, TRAINER_SUFFIX, TRAINER_BOS_ID, TRAINER_EOS_ID = 3, 24, 41, 42
NORMALIZER_CHARSMAP, NORMALIZER_PREFIX, NORMALIZER_TRIM, NORMALIZER_ESCAPE = 2, 3, 4, 5

BPE = 2
CONTROL_PIECE, USER_DEFINED = 3, 4
VARINT, FIXED64, BYTES, FIXED32 = 0, 1, 2, 5


def read_sentencepiece(path: str | os.PathLike) -> Vocabulary:
    """The vocabulary of a SentencePiece model; FormatError where it is none, or not one that a `.t` file can hold."""
    data = read_small_file(path)
    try:
        return parse_sentencepiece(data)
    except ValueError as error:
        raise FormatError(path, str(error)) from None


def parse_sentencepiece(data: bytes) -> Vocabulary:
    """As ``read_sentencepiece``, from the file's bytes. ValueError with the reason."""
    texts, scores, control, user_defined, trainer, normalizer = [], [], [], [], {}, {}
    for number, value in fields(data):
        if number == PIECE:
            piece = dict(fields(value))
            if piece.get(PIECE_KIND) == CONTROL_PIECE:
                control.append(len(texts))
            texts.append(_bytes(piece, PIECE_TEXT).decode().replace(META_SPACE, " "))
            if piece.get(PIECE_KIND) == USER_DEFINED:
                user_defined.append(texts[-1])
            scores.append(struct.unpack("<f", _bytes(piece, PIECE_SCORE, bytes(4)))[0])
        elif number == TRAINER:
            trainer = dict(fields(value))
        elif number == NORMALIZER:
            normalizer = dict(fields(value))
    if trainer.get(TRAINER_KIND, 1) != BPE:
        raise ValueError("not a BPE model, and a .t file holds pieces to merge by score")
    _check_user_defined(user_defined, texts)
    plain = (
        not normalizer.get(NORMALIZER_CHARSMAP)
        and not normalizer.get(NORMALIZER_TRIM, 1)
        and normalizer.get(NORMALIZER_ESCAPE, 1)
        and not trainer.get(TRAINER_SUFFIX, 0)
    )
    if not plain:
        raise ValueError(
            "the model changes its text first (normalisation, trimmed spaces or spaces behind words), "
            "which a .t file cannot say: use the tokenizer.model itself"
        )
    bos_id, eos_id = _signed(trainer.get(TRAINER_BOS_ID, 1)), _signed(trainer.get(TRAINER_EOS_ID, 2))
    for i in set(control) - {bos_id, eos_id}:  # these two a .t file names
        scores[i] = CONTROL
    return Vocabulary(
        [text.encode() for text in texts],
        scores,
        bos_id=bos_id if bos_id >= 0 else None,
        eos_ids=(eos_id,) if eos_id >= 0 else (),
        pre_tokenizer=None if normalizer.get(NORMALIZER_PREFIX, 1) else PreTokenizer.SPACE_NEVER,
    )


def _check_user_defined(pieces: list[str], texts: list[str]) -> None:
    """ValueError for a user-defined piece that merging would not keep whole and apart from its neighbours, as the
    library does: only a character that stands in no other piece is never merged anyway."""
    if pieces:
        found = Counter(character for text in texts for character in text)
        for piece in pieces:
            if len(piece) != 1 or found[piece] != 1:
                raise ValueError(f"user-defined piece {piece!r}, which a .t file cannot mark as such")


def fields(message: bytes | int) -> Iterator[tuple[int, bytes | int]]:
    """The fields of a protobuf message: number, and an int for a varint or the bytes of anything else.

    ValueError for bytes that are no message (https://protobuf.dev/programming-guides/encoding).
    """
    if not isinstance(message, bytes):
        raise ValueError("not a SentencePiece model")
    offset = 0
    while offset < len(message):
        tag, offset = _varint(message, offset)
        kind = tag & 7
        if kind == VARINT:
            value, offset = _varint(message, offset)
            yield tag >> 3, value
            continue
        if kind == BYTES:
            length, offset = _varint(message, offset)
        elif kind in (FIXED32, FIXED64):
            length = 4 if kind == FIXED32 else 8
        else:
            raise ValueError("not a SentencePiece model")
        if length > len(message) - offset:
            raise ValueError("not a SentencePiece model, or truncated")
        yield tag >> 3, message[offset : offset + length]
        offset += length


def _varint(data: bytes, offset: int) -> tuple[int, int]:
    """A number in groups of seven bits, lowest first, and the offset behind it."""
    value = 0
    for shift in range(0, 70, 7):
        if offset >= len(data):
            break
        byte = data[offset]
        offset += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, offset
    raise ValueError("not a SentencePiece model, or truncated")


def _bytes(message: dict, number: int, default: bytes = b"") -> bytes:
    value = message.get(number, default)
    if not isinstance(value, bytes) or (number == PIECE_SCORE and len(value) != 4):
        raise ValueError("not a SentencePiece model")
    return value


def _signed(value: int) -> int:
    """A varint as the int32 it stands for: negative numbers are written as 64 bits of two's complement."""
    if not isinstance(value, int):
        raise ValueError("not a SentencePiece model")
    return value - (1 << 64) if value >= 1 << 63 else value
