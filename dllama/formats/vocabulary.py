"""Tokenizer files that list a vocabulary: `.t`, and llama2.c's `tokenizer.bin`.

Both end in one record a token: ``float32 score``, its length in bytes as 32 bits, the bytes themselves.
"""

import enum
import math
import os
import struct
from dataclasses import dataclass

from dllama.errors import FormatError
from dllama.formats.files import AtomicFile, open_regular
from dllama.formats.header import MAGIC, OLD_MAGIC

T_MAGIC = 0x567124
OLD_T_MAGIC = 0x567123
MAX_FILE_BYTES = 256 << 20

KEYS = (
    "version",
    "vocab_size",
    "max_token_bytes",
    "bos_id",
    "eos_id",  # legacy: one eos id in the header
    "pad_id",  # legacy, not used; a PreTokenizer's number names one
    "chat_eos_id",  # legacy: another eos id
    "chat_template_bytes",
    "chat_stop_bytes",  # legacy: a string after the template, not used
    "n_eos_ids",
    "add_bos",
)
"""Name of each key of a `.t` header, at the key's number."""


UNMERGED, ADDED, CONTROL = -1e10, -2e10, -4e10  # float32 holds them exactly
"""Scores that say what a piece is. The first is the bound below which llama2.c and Distributed Llama merge nothing.

UNMERGED: a piece of text that no merge makes;  ADDED: a special token that is text as well, such as "<think>";
CONTROL: a special token that stands for no text. Files of other programs give special tokens ordinary scores.
"""


class PreTokenizer(enum.IntEnum):
    """What is done to a text before its pieces are merged, where that cannot be told from the vocabulary.

    The numbers are written as the pad id of a `.t` header (key 5), which every reader skips: unlike a key of our own,
    on which Distributed Llama stops.
    """

    # Byte-level vocabularies: how a text is cut into words.
    LLAMA3 = -101
    QWEN2 = -102
    GPT2 = -103
    SMOLLM = -104
    # Others: where a space is put before the text. Without a number it always is, as SentencePiece does.
    SPACE_ALWAYS = -111  # unless the text begins with one
    SPACE_FIRST = -112  # likewise, but not after a special token
    SPACE_NEVER = -113

    @property
    def byte_level(self) -> bool:
        """Whether the vocabulary's pieces are made of bytes, not of characters."""
        return self > PreTokenizer.SPACE_ALWAYS


@dataclass(frozen=True)
class Vocabulary:
    """What a tokenizer file says. Raises ValueError, with the reason, for ids outside the vocabulary and the like.

    A space is the byte 0x20 in pieces. A higher score makes a pair merge earlier; scores from UNMERGED down say what
    else a piece is.
    """

    pieces: list[bytes]
    scores: list[float]
    bos_id: int | None
    eos_ids: tuple[int, ...]
    add_bos: bool = True
    chat_template: str | None = None
    pre_tokenizer: PreTokenizer | None = None

    def __post_init__(self):
        if not self.pieces:
            raise ValueError("a vocabulary of no tokens")
        if len(self.pieces) != len(self.scores):
            raise ValueError(f"{len(self.pieces)} tokens but {len(self.scores)} scores")
        if not all(map(math.isfinite, self.scores)):
            raise ValueError("a token's score is not a finite number")
        try:
            (self.chat_template or "").encode()
        except UnicodeEncodeError:
            raise ValueError("the chat template is not valid Unicode") from None
        for name, ids in (("bos", () if self.bos_id is None else (self.bos_id,)), ("eos", self.eos_ids)):
            for token_id in ids:
                if not 0 <= token_id < len(self.pieces):
                    raise ValueError(f"{name} id {token_id} is outside the vocabulary of {len(self.pieces)} tokens")


def read_small_file(path: str | os.PathLike) -> bytes:
    """All bytes of a tokenizer file; FormatError for one too large to be a tokenizer."""
    with open_regular(path) as file:
        size = os.fstat(file.fileno()).st_size
        if size > MAX_FILE_BYTES:
            raise FormatError(path, f"not a tokenizer: {size:,} bytes, more than {MAX_FILE_BYTES:,}")
        return file.read()


def tokenizer_kind(head: bytes) -> str:
    """The kind of a tokenizer file, "t", "bin" or "sentencepiece", from its first bytes (four at least).

    ValueError, with what the file is instead where that shows.
    """
    magic = int.from_bytes(head[:4], "little")
    if magic in (T_MAGIC, OLD_T_MAGIC):
        return "t"
    if 0 < magic < 1 << 16:  # llama2.c: the longest token's length; a SentencePiece model's upper bytes are not zero
        return "bin"
    if head[:1] == b"\n":  # the tag of a SentencePiece model's first piece
        return "sentencepiece"
    if magic in (MAGIC, OLD_MAGIC):
        raise ValueError("a model, not a tokenizer")
    if head.lstrip()[:1] == b"{":
        raise ValueError("a tokenizer.json, which dllama-convert tokenizer turns into a .t file")
    raise ValueError("not a tokenizer: neither .t, SentencePiece nor llama2.c's tokenizer.bin")


def read_t(path: str | os.PathLike) -> Vocabulary:
    """Read a `.t` file, of the present header or the older one; FormatError where it is not a sound one."""
    return _parse(path, parse_t)


def read_bin(path: str | os.PathLike) -> Vocabulary:
    """Read llama2.c's `tokenizer.bin`, whose bos and eos ids are 1 and 2; FormatError where it is not a sound one."""
    return _parse(path, parse_bin)


def _parse(path, parse) -> Vocabulary:
    try:
        return parse(read_small_file(path))
    except ValueError as error:
        raise FormatError(path, str(error)) from None


def parse_t(data: bytes) -> Vocabulary:
    """The vocabulary in the bytes of a `.t` file; ValueError, with the reason, for anything wrong."""
    magic = _int32s(data, 0, 1)[0]
    if magic == OLD_T_MAGIC:
        n_tokens, _, bos_id, eos_id, _ = _int32s(data, 4, 5)
        header, offset = {"vocab_size": n_tokens, "bos_id": bos_id, "eos_id": eos_id}, 24
    elif magic == T_MAGIC:
        header, offset = _t_header(data)
    else:
        raise ValueError(f"not a .t tokenizer: it starts with {magic & 0xFFFFFFFF:#010x}")

    template_bytes = _length(header, "chat_template_bytes")
    template = _slice(data, offset, template_bytes, "chat template")
    offset += template_bytes
    stop_bytes = _length(header, "chat_stop_bytes")
    _slice(data, offset, stop_bytes, "chat stop")
    offset += stop_bytes
    n_eos_ids = _length(header, "n_eos_ids")
    _slice(data, offset, 4 * n_eos_ids, "eos ids")
    eos_ids = list(_int32s(data, offset, n_eos_ids))
    offset += 4 * n_eos_ids
    for name in ("eos_id", "chat_eos_id"):
        if header.get(name, -1) >= 0:
            eos_ids.append(header[name])

    pieces, scores = _tokens(data, offset, _length(header, "vocab_size"))
    try:
        chat_template = template.decode() or None
    except UnicodeDecodeError:
        raise ValueError("the chat template is not valid UTF-8") from None
    return Vocabulary(
        pieces,
        scores,
        bos_id=header["bos_id"] if header.get("bos_id", -1) >= 0 else None,
        eos_ids=tuple(dict.fromkeys(eos_ids)),
        add_bos=header.get("add_bos", 1) != 0,
        chat_template=chat_template,
        pre_tokenizer=_pre_tokenizer(header.get("pad_id", -1)),
    )


def parse_bin(data: bytes) -> Vocabulary:
    """The vocabulary in the bytes of a `tokenizer.bin`; ValueError, with the reason, for anything wrong."""
    longest = _int32s(data, 0, 1)[0]
    if longest < 1:
        raise ValueError(f"the longest token has {longest} bytes")
    pieces, scores = _tokens(data, 4, None)
    too_long = [i for i, piece in enumerate(pieces) if len(piece) > longest]
    if too_long:
        raise ValueError(f"token {too_long[0]} has {len(pieces[too_long[0]])} bytes, and the longest is said {longest}")
    return Vocabulary(pieces, scores, bos_id=1, eos_ids=(2,))


def write_t(path: str | os.PathLike, vocabulary: Vocabulary) -> None:
    """Write a `.t` file, whole or not at all; FileError where the system refuses."""
    v = vocabulary
    template = (v.chat_template or "").encode()
    header = {
        "version": 1,
        "vocab_size": len(v.pieces),
        "max_token_bytes": max(map(len, v.pieces)),
        "bos_id": -1 if v.bos_id is None else v.bos_id,
        **({} if v.pre_tokenizer is None else {"pad_id": v.pre_tokenizer}),
        **({"chat_template_bytes": len(template)} if template else {}),
        "n_eos_ids": len(v.eos_ids),
        "add_bos": int(v.add_bos),
    }
    pairs = b"".join(struct.pack("<ii", KEYS.index(name), value) for name, value in header.items())
    eos_ids = struct.pack(f"<{len(v.eos_ids)}i", *v.eos_ids)
    _write(path, struct.pack("<ii", T_MAGIC, 8 + len(pairs)) + pairs + template + eos_ids, v)


def write_bin(path: str | os.PathLike, vocabulary: Vocabulary) -> None:
    """Write a `tokenizer.bin`, whole or not at all; ValueError for a vocabulary whose bos and eos are not 1 and 2."""
    if vocabulary.bos_id != 1 or vocabulary.eos_ids != (2,):
        raise ValueError("a tokenizer.bin cannot say which ids are bos and eos: they must be 1 and 2")
    _write(path, struct.pack("<I", max(map(len, vocabulary.pieces))), vocabulary)


def _write(path, head: bytes, vocabulary: Vocabulary) -> None:
    tokens = zip(vocabulary.scores, vocabulary.pieces, strict=True)
    data = head + b"".join(struct.pack("<fI", score, len(piece)) + piece for score, piece in tokens)
    with AtomicFile(path, len(data)) as file:
        file.write(data)


def _t_header(data: bytes) -> tuple[dict[str, int], int]:
    """The pairs of a `.t` header by name, and the offset behind them."""
    size = _int32s(data, 4, 1)[0]
    if size < 16 or size > 8 + 8 * len(KEYS) or size % 8:
        raise ValueError(f"header size {size} is not 8 + 8 * pairs with 1 to {len(KEYS)} pairs")
    numbers = _int32s(data, 8, (size - 8) // 4)
    header: dict[str, int] = {}
    for key, value in zip(numbers[::2], numbers[1::2], strict=True):
        if not 0 <= key < len(KEYS):
            raise ValueError(f"unknown header key {key} (known: 0 to {len(KEYS) - 1})")
        if KEYS[key] in header:
            raise ValueError(f"header key {key} ({KEYS[key]}) appears twice")
        header[KEYS[key]] = value
    if header.get("version", 1) not in (0, 1):
        raise ValueError(f"header version {header['version']} is not known (known: 0 and 1)")
    return header, size


def _pre_tokenizer(pad_id: int) -> PreTokenizer | None:
    if pad_id >= -1:
        return None
    try:
        return PreTokenizer(pad_id)
    except ValueError:
        raise ValueError(f"a pre-tokenizer of number {pad_id}, which is not known: it needs a newer dllama") from None


def _tokens(data: bytes, offset: int, count: int | None) -> tuple[list[bytes], list[float]]:
    """``count`` records, or as many as there are; they must end where the data ends."""
    if count is not None and 8 * count > len(data) - offset:
        raise ValueError(f"truncated: {count} tokens do not fit in {len(data) - offset} bytes")
    record = struct.Struct("<fI")
    pieces, scores = [], []
    while offset < len(data) if count is None else len(pieces) < count:
        if offset + record.size > len(data):
            raise ValueError(f"truncated at token {len(pieces)}")
        score, length = record.unpack_from(data, offset)
        offset += record.size
        pieces.append(_slice(data, offset, length, f"token {len(pieces)}"))
        scores.append(score)
        offset += length
    if offset != len(data):
        raise ValueError(f"oversized: {offset:,} bytes expected, {len(data):,} found")
    return pieces, scores


def _length(header: dict[str, int], name: str) -> int:
    if header.get(name, 0) < 0:
        raise ValueError(f"{name} is {header[name]}")
    return header.get(name, 0)


def _slice(data: bytes, offset: int, length: int, what: str) -> bytes:
    if length > len(data) - offset:
        raise ValueError(f"truncated: {what} has {length} bytes, {len(data) - offset} are left")
    return data[offset : offset + length]


def _int32s(data: bytes, offset: int, count: int) -> tuple[int, ...]:
    if offset + 4 * count > len(data):
        raise ValueError(f"not a tokenizer: {len(data)} bytes")
    return struct.unpack_from(f"<{count}i", data, offset)
