"""The state of a training run in a file."""

import os
from pathlib import Path

import torch

from dllama.errors import FileError
from dllama.formats.files import open_regular, reason


def save_state(path: Path, state: dict) -> None:
    """Write plain values and tensors; the file is replaced whole. Raises FileError."""
    partial = path.with_suffix(".partial")
    try:
        torch.save(state, partial)
        os.replace(partial, path)
    except OSError as error:
        raise FileError(path, f"cannot be written: {reason(error)}") from None


def load_state(path: Path) -> dict:
    """What ``save_state`` wrote, on the CPU. Raises FileError for a file that is missing or something else."""
    with open_regular(path) as file:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True)
        except Exception as error:  # torch tells a damaged file by whatever its parts raise
            raise FileError(
                path, f"not a checkpoint ({str(error).splitlines()[0] if str(error) else error!r})"
            ) from None
    if not isinstance(state, dict):
        raise FileError(path, "not a checkpoint of a training run")
    return state
