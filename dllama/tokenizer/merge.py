"""Tokenizing by a list of scored pieces: `.t` and llama2.c's `tokenizer.bin`.

The text is cut into symbols; then the neighbours whose joined bytes are the piece with the best score become one
symbol, the leftmost first among equals, until no two neighbours make a piece.

Two kinds of vocabulary exist:

- SentencePiece (Llama 1 and 2, Mistral, llama2.c). Symbols are characters, a space is put before the text, and a
  character that is no piece is spelled in byte pieces. It is recognised by its 256 byte pieces, which stand in a row in
  the order of the bytes, as ``<0x00>`` to ``<0xFF>`` or (some converters) as the bytes themselves.
- Byte-level (Llama 3, Qwen): every single byte is a piece, but in another order; symbols are bytes, no space is added,
  and the text is cut into words first, across which nothing merges (pre_tokenizer.py). In files of other programs the
  special tokens begin at the bos id.

A vocabulary that is neither is read as SentencePiece without byte pieces, whose unknown characters become ``<unk>``.
"""

import heapq
from collections.abc import Iterable, Sequence

from dllama.formats.vocabulary import ADDED, CONTROL, UNMERGED, PreTokenizer, Vocabulary
from dllama.tokenizer.base import UNKNOWN, StreamDecoder, check_unicode, decode_all, special_pattern
from dllama.tokenizer.pre_tokenizer import recognise, words

META_SPACE = "\u2581"  # how SentencePiece writes a space inside; in a text it is one more way to write a space


class MergeTokenizer:
    """A tokenizer over a ``Vocabulary``. ValueError for one that cannot spell every text.

    byte_level: whether pieces are made of bytes, not of characters
    first_byte: the id of the piece for byte 0 where 256 byte pieces stand in a row, or None
    pre_tokenizer: the one that the file names, or that its family has
    special_ids: the special tokens that stand for no text, and those that are text as well
    """

    def __init__(self, vocabulary: Vocabulary):
        pieces, scores = vocabulary.pieces, vocabulary.scores
        self.bos_id = vocabulary.bos_id
        self.eos_ids = vocabulary.eos_ids
        self.chat_template = vocabulary.chat_template
        self._add_bos = vocabulary.add_bos
        self._scores = scores
        self.pre_tokenizer = vocabulary.pre_tokenizer
        self.first_byte = _byte_run(pieces)
        if self.pre_tokenizer is None:
            self.byte_level = self.first_byte is None and _has_every_byte(pieces)
            if self.byte_level:
                self.pre_tokenizer = recognise(vocabulary)
        else:
            self.byte_level = self.pre_tokenizer.byte_level
        if self.byte_level:
            self.first_byte = None
        self._unknown_id = 0 if pieces[0] == b"<unk>" else None
        if self.first_byte is None and not self.byte_level and self._unknown_id is None:
            raise ValueError("the vocabulary has neither byte pieces nor an unknown piece, so it cannot spell any text")

        control, added = self.special_ids = self._special_ids(vocabulary)
        self._texts = [b"" if i in control else piece for i, piece in enumerate(pieces)]
        self._ids: dict[bytes, int] = {}
        for i, text in enumerate(self._texts):
            if text and i not in added and i != self._unknown_id and not self._is_byte(i):
                self._ids.setdefault(text, i)
        if self.byte_level and not _has_every_byte(self._ids):
            raise ValueError("a byte-level vocabulary that lacks some of the 256 bytes")
        self._merged = {piece: i for piece, i in self._ids.items() if scores[i] > UNMERGED}
        self._longest = max(map(len, self._merged), default=0)
        named = control | added | ({self._unknown_id} - {None})
        self.special = {pieces[i].decode("utf-8", "replace"): i for i in sorted(named, reverse=True)}
        self._special_pattern = special_pattern(self.special)
        if self._unknown_id is not None:
            self._texts[self._unknown_id] = UNKNOWN
        if self.first_byte is not None:
            self._texts[self.first_byte : self.first_byte + 256] = [bytes([byte]) for byte in range(256)]

    @property
    def vocab_size(self) -> int:
        return len(self._texts)

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """Ids of ``text``; see ``Tokenizer.encode``. Time grows as n log n with the text's length."""
        check_unicode(text)
        ids = [self.bos_id] if bos and self._add_bos and self.bos_id is not None else []
        known: dict[str, list[int]] = {}
        for i, part in enumerate(self._special_pattern.split(text) if special else [text]):
            if i % 2:
                ids.append(self.special[part])
            elif self.byte_level:
                for word in [part] if self.pre_tokenizer is None else words(part, self.pre_tokenizer):
                    if word not in known:
                        known[word] = self._encode_word(word.encode())
                    ids.extend(known[word])
            else:
                self._encode_characters(part, i == 0, ids)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; see ``Tokenizer.decode``."""
        return decode_all(self._decoder(at_start=self._has_prefix), ids)

    def stream(self) -> StreamDecoder:
        """A decoder for ids as they come; see ``Tokenizer.stream``."""
        return self._decoder(at_start=False)

    @property
    def _has_prefix(self) -> bool:
        return not self.byte_level and self.pre_tokenizer is not PreTokenizer.SPACE_NEVER

    def _decoder(self, at_start: bool) -> StreamDecoder:
        return StreamDecoder(self._texts, prefix_after=self.bos_id if self._has_prefix else None, at_start=at_start)

    def _encode_word(self, word: bytes) -> list[int]:
        """Ids of one word of a byte-level text. Llama 3 looks a word up before it merges any of it."""
        if self.pre_tokenizer is PreTokenizer.LLAMA3 and word in self._ids:
            return [self._ids[word]]
        symbols = [word[i : i + 1] for i in range(len(word))]
        return [self._ids[symbol] for symbol in merge(symbols, self._merged, self._scores, self._longest)]

    def _encode_characters(self, text: str, first: bool, ids: list[int]) -> None:
        """Append the ids of a text, or of what is left of it beside special tokens."""
        text = text.replace(META_SPACE, " ")
        style = self.pre_tokenizer
        if text and (
            style is None
            or (style is PreTokenizer.SPACE_ALWAYS and text[0] != " ")
            or (style is PreTokenizer.SPACE_FIRST and text[0] != " " and first)
        ):
            text = " " + text
        symbols = [character.encode() for character in text]
        for symbol in merge(symbols, self._merged, self._scores, self._longest):
            self._spell(symbol, ids)

    def _spell(self, symbol: bytes, ids: list[int]) -> None:
        """Append the ids of one symbol: its piece, or its byte pieces, or one unknown piece for a run of them."""
        token_id = self._ids.get(symbol)
        if token_id is not None:
            ids.append(token_id)
        elif self.first_byte is not None:
            ids.extend(self.first_byte + byte for byte in symbol)
        elif not ids or ids[-1] != self._unknown_id:
            ids.append(self._unknown_id)

    def _special_ids(self, vocabulary: Vocabulary) -> tuple[set[int], set[int]]:
        """Special tokens that stand for no text, and those that are text as well.

        Where no score tells, a byte-level vocabulary's are all from the bos id on.
        """
        control = {i for i, score in enumerate(vocabulary.scores) if score <= CONTROL}
        added = {i for i, score in enumerate(vocabulary.scores) if CONTROL < score <= ADDED}
        bos_id, n_tokens = vocabulary.bos_id, len(vocabulary.pieces)
        if not control and not added and self.byte_level and bos_id is not None and bos_id >= 256:
            control.update(range(bos_id, n_tokens))
        control.update(vocabulary.eos_ids)
        if bos_id is not None:
            control.add(bos_id)
        return control, added - control

    def _is_byte(self, token_id: int) -> bool:
        return self.first_byte is not None and self.first_byte <= token_id < self.first_byte + 256


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


def _has_every_byte(pieces: Iterable[bytes]) -> bool:
    return len({piece for piece in pieces if len(piece) == 1}) == 256
