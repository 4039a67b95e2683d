"""The manifest of a model: where it came from, in ``FILE.m.json`` beside ``FILE.m``.

The `.m` format has no room for it. The file is one JSON object::

    bytes             of the model file
    tail_sha256       of its last MiB, which tells two models of one shape apart
    source            kind ("Meta folder"), name of the folder or file, and files: name, bytes, sha256 of each
    weights           type of the matrices
    quantiser         how they were rounded: "none" of F32 and F16, "copied" of blocks that were
    converter         program and version
"""

import hashlib
import json
import os
from pathlib import Path

from dllama.errors import FormatError
from dllama.formats.files import AtomicFile, open_regular

MAX_BYTES = 4 << 20
TAIL_BYTES = 1 << 20


def manifest_path(model: str | os.PathLike) -> Path:
    """Where the manifest of a model file lies."""
    return Path(f"{os.fspath(model)}.json")


class ManifestWriter:
    """Writes the manifest of a model file that is still to be written, whole or not at all.

    Its place is taken at once, so that one that cannot be written is known before the model is. Use as a context
    manager: leaving the block without a manifest written leaves none. Raises FileError where the system refuses.
    """

    def __init__(self, model: str | os.PathLike):
        self._model = model
        self._file = AtomicFile(manifest_path(model), 0)  # how long it will be is not known yet

    def write(self, values: dict) -> None:
        """Write the manifest of the model file, which is complete by now.

        values: all but what is read from the model file itself
        """
        text = json.dumps(_identity(self._model) | values, indent=2, ensure_ascii=False) + "\n"
        self._file.write(text.encode(errors="backslashreplace"))  # names that are not UTF-8: JSON's own escapes
        self._file.commit()

    def __enter__(self) -> "ManifestWriter":
        return self

    def __exit__(self, *exception) -> None:
        self._file.abort()


def write_manifest(model: str | os.PathLike, values: dict) -> None:
    """Write the manifest of a model file that is there, as ``ManifestWriter.write``."""
    with ManifestWriter(model) as writer:
        writer.write(values)


def read_manifest(model: str | os.PathLike) -> dict | None:
    """The manifest beside a model file, None where there is none.

    Raises FormatError for one that is damaged, or that tells of another model.
    """
    path = manifest_path(model)
    if not os.path.exists(path):
        return None
    with open_regular(path) as file:
        data = file.read(MAX_BYTES + 1)
    try:
        values = json.loads(data.decode()) if len(data) <= MAX_BYTES else None
    except (ValueError, RecursionError):
        values = None
    if not _is_sound(values):
        raise FormatError(path, "not a model's manifest")
    if not _identity(model).items() <= values.items():
        raise FormatError(path, f"not the manifest of {Path(model).name}, but of another model")
    return values


def _identity(model: str | os.PathLike) -> dict:
    """What ties a manifest to its model file."""
    with open_regular(model) as file:
        nbytes = os.fstat(file.fileno()).st_size
        file.seek(max(0, nbytes - TAIL_BYTES))
        return {"bytes": nbytes, "tail_sha256": hashlib.sha256(file.read()).hexdigest()}


def _is_sound(values) -> bool:
    return (
        _has(values, bytes=int, tail_sha256=str, source=dict, weights=str, quantiser=str, converter=str)
        and _has(values["source"], kind=str, name=str, files=list)
        and all(_has(file, name=str, bytes=int, sha256=str) for file in values["source"]["files"])
    )


def _has(values, **kinds: type) -> bool:
    return isinstance(values, dict) and all(type(values.get(name)) is kind for name, kind in kinds.items())
