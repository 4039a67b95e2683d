"""Meta's `tokenizer.model` of Llama 3 -> Vocabulary: lines of a token in base64 and its rank, tiktoken's format.

The special tokens and the chat's end are not in the file; they are those of Llama 3's reference code, with the names
that Llama 3.1 gave to three reserved ones.
"""

import base64
import binascii
import os
import re

from dllama.errors import FormatError
from dllama.formats.vocabulary import CONTROL, PreTokenizer, Vocabulary, read_small_file

N_SPECIAL = 256
NAMED = (
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|reserved_special_token_1|>"),
    *("<|finetune_right_pad_id|>", "<|reserved_special_token_2|>", "<|start_header_id|>", "<|end_header_id|>"),
    *("<|eom_id|>", "<|eot_id|>", "<|python_tag|>"),
)
END_OF_TEXT, END_OF_MESSAGE, END_OF_TURN = 1, 8, 9  # places among the special tokens

FIRST_LINE = re.compile(rb"[A-Za-z0-9+/]+={0,2} 0\r?\n")


def is_tiktoken(head: bytes) -> bool:
    """Whether a file that begins with ``head`` is of tiktoken's format."""
    return FIRST_LINE.match(head) is not None


def read_tiktoken(path: str | os.PathLike) -> Vocabulary:
    """The vocabulary of Llama 3's `tokenizer.model`; FormatError where it is not one."""
    try:
        return parse_tiktoken(read_small_file(path))
    except ValueError as error:
        raise FormatError(path, str(error)) from None


def parse_tiktoken(data: bytes) -> Vocabulary:
    """As ``read_tiktoken``, from the file's bytes. ValueError with the reason."""
    pieces = []
    for line in data.splitlines():
        text, _, rank = line.partition(b" ")
        try:
            pieces.append(base64.b64decode(text, validate=True))
        except binascii.Error:
            raise ValueError(f"line {len(pieces) + 1} is no token in base64") from None
        if rank != b"%d" % (len(pieces) - 1):
            raise ValueError(f"line {len(pieces)} has rank {rank.decode(errors='replace')!r}, not {len(pieces) - 1}")
    scores = [-float(rank) for rank in range(len(pieces))]
    first = len(pieces)
    reserved = [f"<|reserved_special_token_{i}|>" for i in range(3, 3 + N_SPECIAL - len(NAMED))]
    special = [name.encode() for name in (*NAMED, *reserved)]
    return Vocabulary(
        pieces + special,
        scores + [CONTROL] * N_SPECIAL,
        bos_id=first,
        eos_ids=(first + END_OF_TEXT, first + END_OF_MESSAGE, first + END_OF_TURN),
        pre_tokenizer=PreTokenizer.LLAMA3,
    )
