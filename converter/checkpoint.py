"""A checkpoint as the converter sees it, whatever it was read from: the model's shape, and where its values are."""

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from dllama.errors import FileError, FormatError
from dllama.formats import FloatType, ModelConfig, TensorInfo, tensor_layout
from dllama.formats.files import reason
from dllama.formats.tensor import READABLE, Read


class Source(Protocol):
    """The values of one tensor of the model file, read a few rows at a time."""

    name: str  # as the checkpoint calls it
    path: Path  # the file that holds it, or its first part
    offset: int  # of its first byte in that file
    dtype: str
    shape: tuple[int, ...]
    unit: int  # rows are asked for in multiples of it

    def rows(self, start: int, stop: int, read: Read) -> np.ndarray:
        """Rows ``start`` to ``stop`` as float32 [stop - start, columns], in the order of the model file."""

    def raw(self, start: int, stop: int, read: Read) -> np.ndarray:
        """The same rows as the checkpoint stores them, in its ``dtype``: uint8 [stop - start, bytes of a row]."""

    def stored(self, start: int, stop: int, float_type: FloatType, read: Read) -> np.ndarray | None:
        """The same rows as the model file stores them, uint8 [stop - start, row_bytes], where the checkpoint holds just
        these bytes; None where they are to be made from ``rows``. ValueError for values that are not finite."""


@dataclass(frozen=True)
class Checkpoint:
    """A model that can be converted: every tensor of the model file has a source of the right shape."""

    kind: str  # what was read, such as "Meta folder"
    path: Path
    config: ModelConfig
    sources: list[tuple[TensorInfo, Source]]  # in file order
    files: list[Path]  # every file that was or will be read


def match(
    path: Path,
    config: ModelConfig,
    tensors: Mapping[str, Source],
    name_of: Callable[[TensorInfo], str],
    unused: Callable[[str], bool],
    shape_file: str,
) -> list[tuple[TensorInfo, Source]]:
    """The checkpoint's tensor for each of the model file, in file order.

    tensors: all that the checkpoint holds, by name
    name_of: the checkpoint's name of a tensor of the model file;  unused: whether a tensor may be left over
    shape_file: the file that gave the shape, for messages
    FormatError names the first tensor that is missing, of the wrong shape or dtype, or left over.
    """
    pairs = []
    for info in tensor_layout(config):
        name = name_of(info)
        source = tensors.get(name)
        if source is None:
            raise FormatError(path, f"tensor {name} is missing")
        if source.shape != info.shape:
            raise FormatError(
                source.path, f"tensor {name} is {list(source.shape)}, {shape_file} calls for {list(info.shape)}"
            )
        if source.dtype not in READABLE:
            raise FormatError(
                source.path, f"tensor {name} is {source.dtype}, which is not read (known: {', '.join(READABLE)})"
            )
        pairs.append((info, source))
    used = {source.name for _, source in pairs}
    for name, tensor in tensors.items():
        if name not in used and not unused(name):
            raise FormatError(tensor.path, f"tensor {name} has no place in this architecture")
    return pairs


def names_in(folder: Path) -> set[str]:
    """The names in a folder; FileError where it cannot be read."""
    try:
        return set(os.listdir(folder))
    except OSError as error:
        raise FileError(folder, reason(error)) from None
