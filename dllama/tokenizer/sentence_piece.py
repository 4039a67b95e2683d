"""SentencePiece models, through Google's library."""

from collections.abc import Iterable

import sentencepiece

from dllama.tokenizer.base import UNKNOWN, StreamDecoder, check_unicode, decode_all, special_pattern

META_SPACE = "\u2581"  # how SentencePiece writes a space inside a piece


class SentencePieceTokenizer:
    """A tokenizer over the bytes of a SentencePiece ``tokenizer.model``. ValueError where they are not one."""

    chat_template = None

    def __init__(self, model: bytes):
        self._library = sentencepiece.SentencePieceProcessor()
        try:
            self._library.load_from_serialized_proto(model)
            ids = list(range(self._library.vocab_size()))
            pieces = self._library.id_to_piece(ids)
        except (RuntimeError, UnicodeDecodeError):  # the library's own words are of its source lines
            raise ValueError("not a sound SentencePiece model: truncated or damaged") from None
        if not pieces:
            raise ValueError("not a sound SentencePiece model: no pieces")
        bos_id, eos_id = self._library.bos_id(), self._library.eos_id()
        self.bos_id = bos_id if bos_id >= 0 else None
        self.eos_ids = (eos_id,) if eos_id >= 0 else ()
        kinds = zip(pieces, *(kind(ids) for kind in (
            self._library.is_control, self._library.is_unknown, self._library.is_byte)), strict=True)  # fmt: skip
        self._texts = [_text(*kind) for kind in kinds]
        special = (self._library.is_control, self._library.is_unknown)
        self.special = {piece: i for i, piece in enumerate(pieces) if any(kind(i) for kind in special)}
        self._special_pattern = special_pattern(self.special)
        # Models that put a space before the text do so before a lone letter as well.
        self._has_prefix = (self._library.encode("a", out_type=str) or [""])[0].startswith(META_SPACE)

    @property
    def vocab_size(self) -> int:
        return len(self._texts)

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """Ids of ``text``; see ``Tokenizer.encode``."""
        check_unicode(text)
        ids = [self.bos_id] * (bos and self.bos_id is not None)
        for i, part in enumerate(self._special_pattern.split(text) if special else [text]):
            ids += [self.special[part]] if i % 2 else self._library.encode(part)
        return ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``; see ``Tokenizer.decode``."""
        return decode_all(self._decoder(at_start=self._has_prefix), ids)

    def stream(self) -> StreamDecoder:
        """A decoder for ids as they come; see ``Tokenizer.stream``."""
        return self._decoder(at_start=False)

    def _decoder(self, at_start: bool) -> StreamDecoder:
        return StreamDecoder(self._texts, prefix_after=self.bos_id if self._has_prefix else None, at_start=at_start)


def _text(piece: str, is_control: bool, is_unknown: bool, is_byte: bool) -> bytes:
    """The bytes that a piece stands for."""
    if is_control:
        return b""
    if is_unknown:
        return UNKNOWN
    if is_byte:
        return bytes([int(piece[3:5], 16)])  # <0x0A>
    return piece.replace(META_SPACE, " ").encode()
