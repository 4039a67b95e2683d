"""What a path holds, told by its content: the form of a checkpoint, and how it is opened."""

import os
from pathlib import Path

from converter import gguf_file, gguf_model, huggingface, meta
from converter.checkpoint import Checkpoint, names_in
from dllama.errors import FileError
from dllama.formats import FloatType
from dllama.formats.files import open_regular

FORMS = {"hf": huggingface.open_folder, "meta": meta.open_folder, "gguf": gguf_model.open_file}
FOLDERS = ("hf", "meta")


def recognise(path: str | os.PathLike) -> str:
    """The form of the checkpoint at ``path``, a key of FORMS; FileError, with what is read, where it is none."""
    path = Path(path)
    if not os.path.exists(path):
        raise FileError(path, "no such file or folder")
    if os.path.isdir(path):
        names = names_in(path)
        if huggingface.CONFIG in names:
            return "hf"
        if meta.PARAMS in names or any(map(meta.SHARD.fullmatch, names)):
            return "meta"
    else:
        with open_regular(path) as file:
            if gguf_file.is_gguf(file.read(4)):
                return "gguf"
    raise FileError(
        path,
        "not a checkpoint: known are GGUF files, Hugging Face folders (with config.json) "
        "and Meta's (with params.json and consolidated.00.pth)",
    )


def open_checkpoint(
    path: str | os.PathLike, weight_type: FloatType, seq_len: int | None = None, form: str | None = None
) -> Checkpoint:
    """The checkpoint at ``path``, of the form given or the one that it is recognised as.

    seq_len: a shorter context than the model's own, or None
    Raises FileError (FormatError) naming the file and the reason.
    """
    path = Path(path)
    form = form or recognise(path)
    if form in FOLDERS and not os.path.isdir(path):
        raise FileError(path, "not a folder with a checkpoint" if os.path.exists(path) else "no such file or folder")
    return FORMS[form](path, weight_type, seq_len)
