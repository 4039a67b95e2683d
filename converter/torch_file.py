"""Reading a torch checkpoint (`.pth`, `.bin`) without torch, and without loading it.

Since torch 1.6 a file is a zip archive of uncompressed members: ``NAME/data.pkl`` says what the tensors are, and
``NAME/data/KEY`` are their values. Only the pickle is read here; a tensor is then a place in the file like any other.
"""

import math
import os
import struct
import zipfile
from pathlib import Path
from typing import BinaryIO

from converter.torch_pickle import View, read_state
from dllama.errors import FormatError
from dllama.formats.files import open_regular
from dllama.formats.safetensors import LFS_POINTER, NOT_FETCHED
from dllama.formats.tensor import ITEM_BYTES, Tensor

MAX_PICKLE_BYTES = 100_000_000
LOCAL_HEADER = struct.Struct("<4s22xHH")  # of a member: signature, then the lengths of its name and extra field
LOCAL_SIGNATURE = b"PK\x03\x04"


def read_torch_file(path: str | os.PathLike) -> dict[str, Tensor]:
    """Every tensor of a torch checkpoint by name. FileError where it cannot be opened, FormatError with the reason
    where it is not one, is damaged, or asks for more than tensors."""
    path = Path(path)
    with open_regular(path) as file:
        _refuse_others(path, file.read(len(LFS_POINTER)))
        try:
            return _tensors(path, file)
        except (zipfile.BadZipFile, NotImplementedError, EOFError, struct.error, OSError, OverflowError) as error:
            raise FormatError(path, f"truncated or not a torch checkpoint: {error}") from None
        except ValueError as error:
            raise FormatError(path, str(error)) from None


def _refuse_others(path: Path, head: bytes) -> None:
    if head.startswith(LFS_POINTER):
        raise FormatError(path, NOT_FETCHED)
    if head[:1] == b"\x80":
        raise FormatError(
            path,
            "written by torch before 1.6, or in its old format: one pickle, which cannot be read in parts "
            "(torch.load and torch.save it once)",
        )
    if head[:4] != LOCAL_SIGNATURE:
        raise FormatError(path, "not a torch checkpoint: not a zip archive")


def _tensors(path: Path, file: BinaryIO) -> dict[str, Tensor]:
    with zipfile.ZipFile(file) as archive:
        members = {member.filename: member for member in archive.infolist()}
        pickles = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
        if len(pickles) != 1:
            raise ValueError(f"not a torch checkpoint: {len(pickles)} members named data.pkl, where there is one")
        prefix = pickles[0].removesuffix("data.pkl")
        if prefix + "byteorder" in members and _small(archive, members[prefix + "byteorder"]) != b"little":
            raise ValueError("its numbers are big-endian")
        state = read_state(_small(archive, members[pickles[0]]))
    nbytes = os.fstat(file.fileno()).st_size
    offsets = {}
    tensors = {}
    for name, view in state.items():
        key = view.storage.key
        if key not in offsets:
            member = members.get(f"{prefix}data/{key}")
            if member is None:
                raise ValueError(f"damaged: the values of tensor {name} are missing")
            offsets[key] = _data_offset(file, member, nbytes)
        tensors[name] = _tensor(name, path, view, offsets[key], members[f"{prefix}data/{key}"].file_size)
    return tensors


def _small(archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> bytes:
    _check_plain(member)
    if member.file_size > MAX_PICKLE_BYTES:
        raise ValueError(f"not a torch checkpoint: {member.filename} has {member.file_size:,} bytes")
    return archive.read(member)


def _check_plain(member: zipfile.ZipInfo) -> None:
    if member.compress_type != zipfile.ZIP_STORED or member.flag_bits & 1:
        raise ValueError(f"not a torch checkpoint: {member.filename} is compressed or encrypted")


def _data_offset(file: BinaryIO, member: zipfile.ZipInfo, nbytes: int) -> int:
    """Where the bytes of an uncompressed member begin."""
    _check_plain(member)
    file.seek(member.header_offset)
    signature, name_bytes, extra_bytes = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
    offset = member.header_offset + LOCAL_HEADER.size + name_bytes + extra_bytes
    if signature != LOCAL_SIGNATURE or offset + member.file_size > nbytes:
        raise ValueError(f"truncated: {member.filename} ends at byte {offset + member.file_size:,} of {nbytes:,}")
    return offset


def _tensor(name: str, path: Path, view: View, data_offset: int, data_bytes: int) -> Tensor:
    item = ITEM_BYTES[view.storage.dtype]
    if (view.offset + math.prod(view.shape)) * item > data_bytes:
        raise ValueError(f"damaged: tensor {name} is {list(view.shape)}, more than the {data_bytes:,} bytes it lies in")
    if not _is_contiguous(view):
        raise ValueError(f"tensor {name} does not lie row after row (strides {list(view.strides)}): save a copy of it")
    return Tensor(name, path, view.storage.dtype, view.shape, data_offset + view.offset * item)


def _is_contiguous(view: View) -> bool:
    expected = 1
    for size, stride in zip(reversed(view.shape), reversed(view.strides), strict=True):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True
