"""Torch checkpoint files, written with the format's description alone: a zip archive around a pickle of tensors."""

import io
import math
import struct
import zipfile

STORAGES = {"F32": "FloatStorage", "F16": "HalfStorage", "BF16": "BFloat16Storage", "I64": "LongStorage"}


def text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def integer(value: int) -> bytes:
    return b"J" + struct.pack("<i", value)


def name(module: str, attribute: str) -> bytes:
    return f"c{module}\n{attribute}\n".encode()


def integers(values: tuple) -> bytes:
    return b"(" + b"".join(map(integer, values)) + b"t"


def tensor_pickle(dtype: str, key: str, count: int, offset: int, shape: tuple, strides: tuple) -> bytes:
    """torch._utils._rebuild_tensor_v2(storage, offset, shape, strides, False, OrderedDict())"""
    storage = b"(" + text("storage") + name("torch", STORAGES[dtype]) + text(key) + text("cpu") + integer(count) + b"tQ"
    empty = name("collections", "OrderedDict") + b")R"
    place = integer(offset) + integers(shape) + integers(strides)
    return name("torch._utils", "_rebuild_tensor_v2") + b"(" + storage + place + b"\x89" + empty + b"tR"


def state_pickle(entries: dict[str, bytes]) -> bytes:
    """A dictionary of pickled values."""
    return b"\x80\x02}(" + b"".join(text(key) + value for key, value in entries.items()) + b"u."


def archive(pickle: bytes, storages: dict[str, bytes], prefix: str = "archive", **extra: bytes) -> bytes:
    """The zip archive; each member's data at a multiple of 64 bytes, as torch puts them."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as file:
        members = {"data.pkl": pickle, "byteorder": b"little"} | extra
        members |= {f"data/{key}": data for key, data in storages.items()}
        for path, data in members.items():
            member = zipfile.ZipInfo(f"{prefix}/{path}")
            used = out.tell() + 30 + len(member.filename) + 4
            padding = -used % 64
            member.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
            file.writestr(member, data)
    return out.getvalue()


def strides_of(shape: tuple) -> tuple:
    return tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))


def torch_bytes(tensors: dict[str, tuple[str, tuple, bytes]]) -> bytes:
    """A checkpoint of ``name -> (dtype, shape, bytes)``, each tensor in a storage of its own."""
    entries, storages = {}, {}
    for number, (key, (dtype, shape, data)) in enumerate(tensors.items()):
        entries[key] = tensor_pickle(dtype, str(number), math.prod(shape), 0, shape, strides_of(shape))
        storages[str(number)] = data
    return archive(state_pickle(entries), storages)
