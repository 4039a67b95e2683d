"""A PrivateLoRA adapter in memory, and its two files: `cloud.plora` with A and B, `edge.plora` with M.

Both are safetensors files. Their metadata tell the kind ("privatelora cloud" or "privatelora edge"), the version, the
shape (``AdapterShape.to_metadata``), the fingerprint of A and B, and the seed where these come from one; a cloud file
with a seed holds no tensors. Tensors are called ``layers.3.q.A``, F16 or F32 as written, BF16 too as read.

Rows of B for q and k are in the order of Hugging Face's matrices, as the published adapters have them, whatever the
order of the model file; ``CloudAdapter.b_in_model`` gives the latter.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from dllama.errors import AdapterError, FileError
from dllama.formats import ModelConfig
from dllama.formats.files import AtomicFile, reason
from dllama.formats.rotary import to_model_order
from dllama.formats.safetensors import read_with_metadata, write_safetensors
from dllama.formats.tensor import Tensor
from dllama.privatelora.frozen import MAX_SEED, frozen_matrix
from dllama.privatelora.shape import AdapterShape, Place, whole
from dllama.targets import TARGETS

CLOUD_FILE, EDGE_FILE = "cloud.plora", "edge.plora"
CLOUD, EDGE = "privatelora cloud", "privatelora edge"
HALVES = {CLOUD: "the cloud's half (A and B)", EDGE: "the edge's half (M)"}
VERSION = 1


@dataclass(frozen=True)
class CloudAdapter:
    """A and B, frozen. They come from ``seed``, and are then made when they are asked for, or are ``matrices``.

    matrices: (layer, target, "A" or "B") -> float32 or float16
    name: what messages call it, the file's path
    """

    shape: AdapterShape
    seed: int | None = None
    matrices: Mapping[tuple[int, str, str], np.ndarray] | None = None
    name: str = "the adapter"

    def a(self, layer: int, target: str) -> np.ndarray:
        """float32 [r_c2d, inputs of the target]"""
        return self._matrix(layer, target, "A", self.shape.a(target))

    def b(self, layer: int, target: str) -> np.ndarray:
        """float32 [outputs of the target, r_d2c], rows in the order of Hugging Face's matrices"""
        return self._matrix(layer, target, "B", self.shape.b(target))

    def b_in_model(self, layer: int, target: str, config: ModelConfig) -> np.ndarray:
        """As ``b``, rows in the order of the model file that ``config`` is of."""
        return to_model_order(self.b(layer, target), TARGETS[target].matrix, config)

    @cached_property
    def fingerprint(self) -> str:
        """What ties the halves together: a hash of the shape and of the seed, or of the values of A and B."""
        digest = hashlib.sha256(json.dumps(self.shape.to_metadata(), sort_keys=True).encode())
        if self.seed is not None:
            digest.update(f"seed {self.seed}".encode())
        else:
            for layer, target in self.shape.places():
                for matrix in (self.a(layer, target), self.b(layer, target)):
                    digest.update(np.ascontiguousarray(matrix))
        return digest.hexdigest()

    def check(self, config: ModelConfig) -> None:
        """AdapterError where the model is not the one that the adapter is for."""
        _check_model(self, config)

    def _matrix(self, layer: int, target: str, matrix: str, shape: tuple[int, int]) -> np.ndarray:
        if self.seed is not None:
            return frozen_matrix(self.seed, layer, target, matrix, shape)
        return self.matrices[layer, target, matrix].astype(np.float32, copy=False)


@dataclass(frozen=True)
class EdgeAdapter:
    """M, trained and private.

    matrices: (layer, target) -> float32 or float16 [r_d2c, r_c2d]
    fingerprint: of the A and B that it was trained with;  seed: theirs, None where they have none
    name: what messages call it, the file's path
    """

    shape: AdapterShape
    matrices: Mapping[Place, np.ndarray]
    fingerprint: str
    seed: int | None = None
    name: str = "the adapter"

    def m(self, layer: int, target: str) -> np.ndarray:
        """float32 [r_d2c, r_c2d]"""
        return self.matrices[layer, target].astype(np.float32, copy=False)

    def check(self, config: ModelConfig) -> None:
        """AdapterError where the model is not the one that the adapter is for."""
        _check_model(self, config)

    def check_pair(self, cloud: CloudAdapter) -> None:
        """AdapterError where M was trained with other A and B."""
        if self.shape != cloud.shape:
            raise AdapterError(f"{self.name}: its shape is not that of {cloud.name}; {_difference(self, cloud)}")
        if self.fingerprint != cloud.fingerprint:
            raise AdapterError(f"{self.name}: trained with other A and B than those of {cloud.name}")


def write_adapter(folder: str | os.PathLike, cloud: CloudAdapter, edge: EdgeAdapter) -> None:
    """Write both files into a folder, which is made where it is missing. Raises FileError."""
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(folder, f"cannot be made: {reason(error)}") from None
    AtomicFile(Path(folder, EDGE_FILE), 0).abort()  # one that cannot be written leaves no half of an adapter
    write_cloud(Path(folder, CLOUD_FILE), cloud)
    write_edge(Path(folder, EDGE_FILE), edge)


def write_cloud(path: str | os.PathLike, adapter: CloudAdapter) -> None:
    """Write A and B, in the dtype that they have, or only their seed. Raises FileError."""
    tensors = {_name(*place): matrix for place, matrix in (adapter.matrices or {}).items()}
    write_safetensors(path, tensors, _metadata(CLOUD, adapter))


def write_edge(path: str | os.PathLike, adapter: EdgeAdapter) -> None:
    """Write M, in the dtype that it has. Raises FileError."""
    tensors = {_name(*place, "M"): matrix for place, matrix in adapter.matrices.items()}
    write_safetensors(path, tensors, _metadata(EDGE, adapter))


def read_cloud(path: str | os.PathLike) -> CloudAdapter:
    """The cloud's half. Raises FileError where the file cannot be read, FormatError where it is damaged or not
    finite, AdapterError where it is something else, or is not as its metadata say."""
    tensors, shape, seed, fingerprint = _open(path, CLOUD)
    if seed is not None:
        _read(path, tensors, {})
        adapter = CloudAdapter(shape, seed, name=str(path))
    else:
        expected = {}
        for layer, target in shape.places():
            expected[layer, target, "A"] = shape.a(target)
            expected[layer, target, "B"] = shape.b(target)
        adapter = CloudAdapter(shape, matrices=_read(path, tensors, expected), name=str(path))
    if adapter.fingerprint != fingerprint:
        raise AdapterError(f"{path}: damaged: its fingerprint is not that of its A and B")
    return adapter


def read_edge(path: str | os.PathLike) -> EdgeAdapter:
    """The edge's half; errors as of ``read_cloud``."""
    tensors, shape, seed, fingerprint = _open(path, EDGE)
    if seed is not None and CloudAdapter(shape, seed).fingerprint != fingerprint:
        raise AdapterError(f"{path}: damaged: its fingerprint is not that of its seed")
    matrices = _read(path, tensors, {(layer, target, "M"): shape.m for layer, target in shape.places()})
    places = {(layer, target): matrix for (layer, target, _), matrix in matrices.items()}
    return EdgeAdapter(shape, places, fingerprint, seed, str(path))


def _name(layer: int, target: str, matrix: str) -> str:
    return f"layers.{layer}.{target}.{matrix}"


def _metadata(kind: str, adapter: CloudAdapter | EdgeAdapter) -> dict[str, str]:
    seed = {} if adapter.seed is None else {"seed": str(adapter.seed)}
    head = {"kind": kind, "version": str(VERSION)}
    return head | adapter.shape.to_metadata() | {"fingerprint": adapter.fingerprint} | seed


def _open(path: str | os.PathLike, kind: str) -> tuple[dict[str, Tensor], AdapterShape, int | None, str]:
    """Tensors, shape, seed and fingerprint of a file of the kind asked for."""
    tensors, metadata = read_with_metadata(path)
    found = metadata.get("kind")
    if found in HALVES and found != kind:
        raise AdapterError(f"{path}: this is {HALVES[found]}, where {HALVES[kind]} belongs")
    if found != kind:
        raise AdapterError(f"{path}: no PrivateLoRA adapter (dllama train and dllama-convert privatelora write them)")
    try:
        if whole(metadata, "version") != VERSION:
            raise ValueError(f"version {metadata['version']}, and this program reads {VERSION}")
        shape = AdapterShape.from_metadata(metadata)
        seed = whole(metadata, "seed") if "seed" in metadata else None
        if seed is not None and seed > MAX_SEED:
            raise ValueError("its seed has more than 64 bits")
    except ValueError as error:
        raise AdapterError(f"{path}: not a sound adapter: {error}") from None
    return tensors, shape, seed, metadata.get("fingerprint", "")


def _read(
    path: str | os.PathLike, tensors: Mapping[str, Tensor], expected: Mapping[tuple[int, str, str], tuple[int, int]]
) -> dict[tuple[int, str, str], np.ndarray]:
    """The values of just the matrices expected: (layer, target, matrix) -> float32 of the shape given with it."""
    names = {_name(*key): key for key in expected}
    _check_names(path, tensors, names)
    for name, key in names.items():
        tensor = tensors[name]
        if tensor.shape != expected[key]:
            raise AdapterError(
                f"{path}: tensor {name} is {list(tensor.shape)}, its metadata call for {list(expected[key])}"
            )
    return {key: tensors[name].values() for name, key in names.items()}


def _check_names(path: str | os.PathLike, found: Iterable[str], expected: Iterable[str]) -> None:
    found, expected = set(found), set(expected)
    for name in sorted(expected - found):
        raise AdapterError(f"{path}: tensor {name} is missing")
    for name in sorted(found - expected):
        raise AdapterError(f"{path}: tensor {name} has no place in the adapter")


def _check_model(adapter: CloudAdapter | EdgeAdapter, config: ModelConfig) -> None:
    mismatch = adapter.shape.mismatch(config)
    if mismatch:
        raise AdapterError(f"{adapter.name}: {mismatch}")


def _difference(edge: EdgeAdapter, cloud: CloudAdapter) -> str:
    """The first entry in which the shapes of two halves differ, in words."""
    ours, theirs = edge.shape.to_metadata(), cloud.shape.to_metadata()
    name = next(name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name))
    return f"{name} is {ours.get(name)} here and {theirs.get(name)} there"
