"""Tokenizers of other programs -> a `.t` file."""

import os
from dataclasses import replace
from pathlib import Path

from converter import gguf_file
from converter.gguf_tokenizer import read_gguf_tokenizer
from converter.sentencepiece_model import read_sentencepiece
from converter.tiktoken_model import is_tiktoken, read_tiktoken
from converter.tokenizer_json import read_tokenizer_json
from dllama.errors import FileError, FormatError
from dllama.formats.files import open_regular, refuse_overwriting
from dllama.formats.json_file import read_json
from dllama.formats.vocabulary import Vocabulary, read_bin, read_small_file, read_t, tokenizer_kind, write_t

HEAD_BYTES = 64  # of a file, to tell its kind
FOLDER_FILES = (
    *("tokenizer.model", "tokenizer.json", "tokenizer_config.json", "config.json", "generation_config.json"),
    "chat_template.jinja",
)
"""What a checkpoint folder may hold of a tokenizer."""


def convert_tokenizer(path: str | os.PathLike, out: str | os.PathLike) -> Vocabulary:
    """Write the tokenizer at ``path``, a file or a checkpoint folder, as the `.t` file ``out``, and return it.

    Raises FileError (FormatError) naming the file and the reason; ``out`` then is as it was.
    """
    refuse_overwriting(out, tokenizer_files(path))
    vocabulary = read_tokenizer(path)
    write_t(out, vocabulary)
    return vocabulary


def tokenizer_files(path: str | os.PathLike) -> list[Path]:
    """The files that a tokenizer may be made from, whether they are there or not."""
    path = Path(path)
    if os.path.isdir(path):
        return [path / name for name in FOLDER_FILES]
    return [path, *(path.parent / name for name in FOLDER_FILES if path.suffix == ".json")]


def read_tokenizer(path: str | os.PathLike) -> Vocabulary:
    """The vocabulary at ``path``, a file or a checkpoint folder; FileError (FormatError) as ``convert_tokenizer``."""
    path = Path(path)
    return _from_folder(path) if os.path.isdir(path) else _from_file(path)


def _from_file(path: Path) -> Vocabulary:
    with open_regular(path) as file:
        head = file.read(HEAD_BYTES)
    if gguf_file.is_gguf(head):
        return read_gguf_tokenizer(path)
    if head.lstrip()[:1] == b"{":
        return _from_json(path)
    if is_tiktoken(head):
        return read_tiktoken(path)
    try:
        kind = tokenizer_kind(head)
    except ValueError as error:
        raise FormatError(path, str(error)) from None
    return {"t": read_t, "bin": read_bin, "sentencepiece": read_sentencepiece}[kind](path)


def _from_folder(folder: Path) -> Vocabulary:
    """The tokenizer of a checkpoint, with the chat template and the further eos ids that lie beside it.

    A tokenizer.model comes first, for its own library reads it as it is; but one that lacks tokens which the model has
    and a tokenizer.json adds gives way to it.
    """
    model, json = folder / "tokenizer.model", folder / "tokenizer.json"
    if not os.path.exists(model):
        if os.path.exists(json):
            return _from_json(json)
        raise FileError(folder, "holds neither tokenizer.model nor tokenizer.json")
    with open_regular(model) as file:
        vocabulary = read_tiktoken(model) if is_tiktoken(file.read(HEAD_BYTES)) else None
    if vocabulary is None:
        size = _optional(folder / "config.json").get("vocab_size")
        vocabulary = read_sentencepiece(model)
        if os.path.exists(json) and size is not None and size != len(vocabulary.pieces):
            return _from_json(json)
        if size is not None and size != len(vocabulary.pieces):
            raise FormatError(
                model,
                f"{len(vocabulary.pieces)} tokens, and config.json says {size}: there is no tokenizer.json with more",
            )
    return _with_settings(vocabulary, folder, vocabulary.eos_ids)


def _from_json(path: Path) -> Vocabulary:
    """The vocabulary of a tokenizer.json, and what the files beside it say."""
    folder = path.parent
    settings, config = _optional(folder / "tokenizer_config.json"), _optional(folder / "config.json")
    bos = _content(settings.get("bos_token"))
    if bos is None and type(config.get("bos_token_id")) is int:
        bos = config["bos_token_id"]
    size = config.get("vocab_size")
    if size is not None and type(size) is not int:
        raise FormatError(folder / "config.json", f"vocab_size is {size!r}, not a whole number")
    vocabulary = read_tokenizer_json(path, bos, size)
    eos = _content(settings.get("eos_token"))
    eos_piece = None if eos is None else eos.encode("utf-8", "replace")
    eos_ids = [vocabulary.pieces.index(eos_piece)] if eos_piece in vocabulary.pieces else []
    return _with_settings(vocabulary, folder, eos_ids)


def _with_settings(vocabulary: Vocabulary, folder: Path, eos_ids) -> Vocabulary:
    """With the folder's chat template and the eos ids of its configurations, after ``eos_ids``."""
    eos_ids = list(eos_ids)
    for name in ("config.json", "generation_config.json"):
        more = _optional(folder / name).get("eos_token_id")
        eos_ids += [i for i in (more if isinstance(more, list) else [more]) if type(i) is int]
    try:
        return replace(vocabulary, eos_ids=tuple(dict.fromkeys(eos_ids)), chat_template=_chat_template(folder))
    except ValueError as error:
        raise FormatError(folder, str(error)) from None


def _content(token) -> str | None:
    """A token as a tokenizer's settings name it: its text, or an object with it, or nothing."""
    token = token.get("content") if isinstance(token, dict) else token
    return token if isinstance(token, str) else None


def _chat_template(folder: Path) -> str | None:
    """The template, in a file of its own or (older checkpoints) among the tokenizer's settings."""
    path = folder / "chat_template.jinja"
    if not os.path.exists(path):
        template = _optional(folder / "tokenizer_config.json").get("chat_template")
        if isinstance(template, list):  # several, by name
            named = [item for item in template if isinstance(item, dict) and item.get("name") == "default"]
            template = named[0].get("template") if named else None
        return template if isinstance(template, str) else None
    try:
        return read_small_file(path).decode()
    except UnicodeDecodeError:
        raise FormatError(path, "not UTF-8 text") from None


def _optional(path: Path) -> dict:
    return read_json(path) if os.path.exists(path) else {}
