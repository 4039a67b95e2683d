"""Tokenizing by a list of scored pieces: `.t` and llama2.c's `tokenizer.bin`.

The text is cut into symbols; then the neighbours whose joined bytes are the piece with the best score become one
symbol, the leftmost first among equals, until no two neighbours make a piece.

The files do not say where their vocabulary comes from, and two kinds exist:

- SentencePiece (Llama 1 and 2, Mistral, llama2.c). Symbols are characters, a space is put before the text, and a
  character that is no piece is spelled in byte pieces. It is recognised by its 256 byte pieces, which stand in a row in
  the order of the bytes, as ``<0x00>`` to ``<0xFF>`` or (some converters) as the bytes themselves.
- Byte-level (Llama 3, Qwen): every single byte is a piece, but in another order; symbols are bytes and no space is
  added. The special tokens begin at the bos id and are never matched in text.

A vocabulary that is neither is read as SentencePiece without byte pieces, whose unknown characters become ``<unk>``.
"""

import heapq
from collections.abc import Iterable, Sequence

from dllama.formats.vocabulary import Vocabulary
from dllama.tokenizer.base import UNKNOWN, StreamDecoder, check_unicode, decode_all

META_SPACE = "\u2581"  # how SentencePiece writes a space inside; in a text it is one more way to write a space


class MergeTokenizer:
    """A tokenizer over a ``Vocabulary``. ValueError for one that cannot spell every text."""

    def __init__(self, vocabulary: Vocabulary):
        pieces = vocabulary.pieces
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.chat_template = vocabulary.chat_template
        self._add_bos = vocabulary.add_bos
        self._scores = vocabulary.scores
        self._first_byte = _byte_run(pieces)
        self._byte_level = self._first_byte is None and _has_every_byte(pieces)
        self._unknown_id = 0 if pieces[0] == b"<unk>" else None
        if self._first_byte is None and not self._byte_level and self._unknown_id is None:
            raise ValueError("the vocabulary has neither byte pieces nor an unknown piece, so it cannot spell any text")

        special = self._special_ids(len(pieces))
        self._texts = [b"" if i in special else piece for i, piece in enumerate(pieces)]
        self._ids: dict[bytes, int] = {}
        for i, text in enumerate(self._texts):
            if text and i != self._unknown_id and not self._is_byte(i):
                self._ids.setdefault(text, i)
        self._longest = max(map(len, self._ids), default=0)
        if self._unknown_id is not None:
            self._texts[self._unknown_id] = UNKNOWN
        if self._first_byte is not None:
            self._texts[self._first_byte : self._first_byte + 256] = [bytes([byte]) for byte in range(256)]

    @property
    def vocab_size(self) -> int:
        return len(self._texts)

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Ids of ``text``; see ``Tokenizer.encode``. Time grows as n log n with the text's length."""
        check_unicode(text)
        ids = [self.bos_id] if bos and self._add_bos and self.bos_id is not None else []
        if not text:
            return ids
        if self._byte_level:
            data = text.encode()
            symbols = [data[i : i + 1] for i in range(len(data))]
        else:
            symbols = [character.encode() for character in " " + text.replace(META_SPACE, " ")]
        for symbol in merge(symbols, self._ids, self._scores, self._longest):
            self._spell(symbol, ids)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; see ``Tokenizer.decode``."""
        return decode_all(self._decoder(at_start=not self._byte_level), ids)

    def stream(self) -> StreamDecoder:
        """A decoder for ids as they come; see ``Tokenizer.stream``."""
        return self._decoder(at_start=False)

    def _decoder(self, at_start: bool) -> StreamDecoder:
        return StreamDecoder(self._texts, prefix_after=None if self._byte_level else self.bos_id, at_start=at_start)

    def _spell(self, symbol: bytes, ids: list[int]) -> None:
        """Append the ids of one symbol: its piece, or its byte pieces, or one unknown piece for a run of them."""
        token_id = self._ids.get(symbol)
        if token_id is not None:
            ids.append(token_id)
        elif self._first_byte is not None:
            ids.extend(self._first_byte + byte for byte in symbol)
        elif not ids or ids[-1] != self._unknown_id:
            ids.append(self._unknown_id)

    def _special_ids(self, vocab_size: int) -> set[int]:
        """Ids that stand for no text: bos, eos and, in a byte-level vocabulary, all from the bos id on."""
        special = set(self.eos_ids)
        if self.bos_id is not None:
            special.update(range(self.bos_id, vocab_size) if self._byte_level and self.bos_id >= 256 else [self.bos_id])
        return special

    def _is_byte(self, token_id: int) -> bool:
        return self._first_byte is not None and self._first_byte <= token_id < self._first_byte + 256


def merge(symbols: Sequence[bytes], ids: dict[bytes, int], scores: Sequence[float], longest: int) -> list[bytes]:
    """Join neighbouring symbols, best score first, leftmost among equals, until no joined pair is a piece.

    ids: piece -> id;  scores: by id;  longest: bytes of the longest piece

    The symbols are a doubly linked list, the joinable pairs a heap. A pair is known by its left symbol and its joined
    bytes; an entry whose left symbol is gone or whose pair has grown since is skipped when it comes up.
    """
    symbols = list(symbols)
    n = len(symbols)
    after = list(range(1, n + 1))  # index of the next symbol, n at the end
    before = list(range(-1, n - 1))
    heap: list[tuple[float, int, bytes]] = []

    def offer(left: int) -> None:
        right = after[left]
        if right < n and len(symbols[left]) + len(symbols[right]) <= longest:
            joined = symbols[left] + symbols[right]
            token_id = ids.get(joined)
            if token_id is not None:
                heapq.heappush(heap, (-scores[token_id], left, joined))

    for left in range(n - 1):
        offer(left)
    while heap:
        _, left, joined = heapq.heappop(heap)
        right = after[left]
        if right >= n or not symbols[left] or symbols[left] + symbols[right] != joined:
            continue
        symbols[left], symbols[right] = joined, b""
        after[left] = after[right]
        if after[left] < n:
            before[after[left]] = left
        if before[left] >= 0:
            offer(before[left])
        offer(left)
    return [symbol for symbol in symbols if symbol]


def _byte_run(pieces: Sequence[bytes]) -> int | None:
    """The id of the piece for byte 0 where 256 byte pieces stand in a row, or None."""
    for spelled in ([b"<0x%02X>" % byte for byte in range(256)], [bytes([byte]) for byte in range(256)]):
        start = -1
        while True:
            try:
                start = pieces.index(spelled[0], start + 1)
            except ValueError:
                break
            if pieces[start : start + 256] == spelled:
                return start
    return None


def _has_every_byte(pieces: Sequence[bytes]) -> bool:
    return len({piece for piece in pieces if len(piece) == 1}) == 256
