"""What every tokenizer does, and the decoder that turns ids into text as they come."""

import codecs
import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from dllama.errors import PromptError

UNKNOWN = " \u2047 ".encode()  # what an unknown piece decodes to, as in the SentencePiece library


class StreamDecoder:
    """Turns token ids into text, one at a time, never giving out a part of a character.

    ``push`` holds back the first bytes of a character until the rest has come; ``flush`` ends the text. Bytes that
    are not UTF-8 become U+FFFD.
    """

    def __init__(self, texts: Sequence[bytes], *, prefix_after: int | None, at_start: bool):
        """
        texts: the bytes of each id
        prefix_after: the bos id where the first piece of a text carries a space that the text does not have, or None
        at_start: whether the first piece begins a text, and so loses this space; else only the one after bos does
        """
        self._texts = texts
        self._prefix_after = prefix_after
        self._strip = at_start
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """The text that ``token_id`` completes, often "" or several characters; ValueError for no such id."""
        if not 0 <= token_id < len(self._texts):
            raise ValueError(f"token id {token_id} is outside the vocabulary of {len(self._texts)} tokens")
        data = self._texts[token_id]
        if token_id == self._prefix_after:
            self._strip = True
        elif data and self._strip:
            self._strip = False
            data = data.removeprefix(b" ")
        return self._utf8.decode(data)

    def flush(self) -> str:
        """The rest: "", or U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


class Tokenizer(Protocol):
    """Text to token ids and back.

    bos_id: the id that begins a text, or None;  eos_ids: ids that end one;  chat_template: Jinja text, or None
    special: how each special token is spelled -> its id
    """

    bos_id: int | None
    eos_ids: tuple[int, ...]
    chat_template: str | None
    special: dict[str, int]

    @property
    def vocab_size(self) -> int: ...

    def encode(self, text: str, bos: bool = True, special: bool = False) -> list[int]:
        """Ids of ``text``. ``bos`` puts the bos id first, where the tokenizer has one and its file asks for it.

        Special tokens spelled out in the text are text like any other, unless ``special`` asks for their ids: that is
        for what a chat template wrote, and never for what a user did. PromptError for text that is not Unicode.
        """

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ``ids``, taken as a text from its start. Special tokens give nothing."""

    def stream(self) -> StreamDecoder:
        """A decoder for ids that continue a text (or begin one, where bos is pushed first)."""


def decode_all(decoder: StreamDecoder, ids: Iterable[int]) -> str:
    """The text of all ``ids``."""
    return "".join(map(decoder.push, ids)) + decoder.flush()


def check_unicode(text: str) -> None:
    """PromptError for a text with lone surrogates, which is how Python hands on bytes that are not UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise PromptError(f"the text is not valid Unicode at character {error.start}") from None


def special_pattern(tokens: Iterable[str]) -> re.Pattern:
    """Finds special tokens in a text, the longest where several begin at one place; splitting by it keeps them."""
    longest_first = sorted(filter(None, tokens), key=len, reverse=True)
    return re.compile(f"({'|'.join(map(re.escape, longest_first)) or '(?!)'})")
