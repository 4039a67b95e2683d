"""Tokenizers of other programs -> a `.t` file."""

import os
from dataclasses import replace
from pathlib import Path

from converter.safetensors import read_json
from converter.sentencepiece_model import read_sentencepiece
from dllama.errors import FileError, FormatError
from dllama.formats.files import open_regular
from dllama.formats.vocabulary import Vocabulary, read_bin, read_small_file, read_t, tokenizer_kind, write_t


def convert_tokenizer(path: str | os.PathLike, out: str | os.PathLike) -> Vocabulary:
    """Write the tokenizer at ``path``, a file or a checkpoint folder, as the `.t` file ``out``, and return it.

    Raises FileError (FormatError) naming the file and the reason; ``out`` then is as it was.
    """
    path = Path(path)
    vocabulary = _from_folder(path) if path.is_dir() else _from_file(path)
    write_t(out, vocabulary)
    return vocabulary


def _from_file(path: Path) -> Vocabulary:
    with open_regular(path) as file:
        head = file.read(16)
    try:
        kind = tokenizer_kind(head)
    except ValueError as error:
        raise FormatError(path, str(error)) from None
    return {"t": read_t, "bin": read_bin, "sentencepiece": read_sentencepiece}[kind](path)


def _from_folder(folder: Path) -> Vocabulary:
    """The tokenizer of a checkpoint, with the chat template and the further eos ids that lie beside it."""
    model = folder / "tokenizer.model"
    if not model.exists():
        if (folder / "tokenizer.json").exists():
            raise FileError(folder / "tokenizer.json", "not supported yet, and there is no tokenizer.model beside it")
        raise FileError(folder, "holds no tokenizer.model")
    vocabulary = read_sentencepiece(model)
    config = _optional(folder / "config.json")
    size = config.get("vocab_size", len(vocabulary.pieces))
    if size != len(vocabulary.pieces):
        raise FormatError(
            model, f"{len(vocabulary.pieces)} tokens, and config.json says {size}: added tokens are not supported yet"
        )
    template = _chat_template(folder)
    eos_ids = list(vocabulary.eos_ids)
    for values in (config, _optional(folder / "generation_config.json")):
        more = values.get("eos_token_id")
        eos_ids += [i for i in (more if isinstance(more, list) else [more]) if type(i) is int]
    try:
        return replace(
            vocabulary,
            eos_ids=tuple(dict.fromkeys(eos_ids)),
            chat_template=template,
        )
    except ValueError as error:
        raise FormatError(folder, str(error)) from None


def _chat_template(folder: Path) -> str | None:
    """The template, in a file of its own or (older checkpoints) among the tokenizer's settings."""
    path = folder / "chat_template.jinja"
    if not path.exists():
        template = _optional(folder / "tokenizer_config.json").get("chat_template")
        return template if isinstance(template, str) else None
    try:
        return read_small_file(path).decode()
    except UnicodeDecodeError:
        raise FormatError(path, "not UTF-8 text") from None


def _optional(path: Path) -> dict:
    return read_json(path) if path.exists() else {}
