"""libzmq's own functions for compiled code: zmq_send(3), zmq_msg_recv(3), zmq_poll(3).

They work on the sockets that pyzmq has made, and by the same thread as Python does.
"""

from __future__ import annotations

import ctypes
import weakref

import numpy as np
import zmq
from llvmlite import ir
from numba import types
from zmq.backend.cython import _zmq

from dllama.kernels.emit import I32, I64, emitted
from dllama.kernels.jit import jit

NOBLOCK = int(zmq.NOBLOCK)
MORE = int(zmq.NOBLOCK | zmq.SNDMORE)
FRAMES = 4  # a ROUTER's routing id, the two that a message may have, and one more, so that too many are noticed
FRAME_BYTES = 64  # zmq_msg_t
RETRIES = 1000
"""How often a frame after a message's first is tried again: it fails at most where a signal comes in between."""

FUNCTIONS = ("zmq_send", "zmq_msg_recv", "zmq_msg_more", "zmq_msg_size", "zmq_msg_data", "zmq_poll")
API = np.zeros(1, [(name, np.int64) for name in FUNCTIONS])
"""Their addresses, for the functions below."""

ITEM = np.dtype([("socket", np.int64), ("fd", np.int32), ("events", np.int16), ("revents", np.int16)])
"""zmq_pollitem_t."""


def _call(e, result, function, *args):
    kind = ir.FunctionType(result, [each.type for each in args])
    return e.builder.call(e.inttoptr(function, kind.as_pointer()), args)


@emitted(types.int64)
def send(e, function, socket, data, nbytes, flags):
    return e.sext(_call(e, I32, function, socket, data, nbytes, e.trunc(flags, I32)), I64)


@emitted(types.int64)
def receive(e, function, frame, socket, flags):
    return e.sext(_call(e, I32, function, frame, socket, e.trunc(flags, I32)), I64)


@emitted(types.int64)
def more(e, function, frame):
    return e.sext(_call(e, I32, function, frame), I64)


@emitted(types.int64)
def of_frame(e, function, frame):
    """Its size, or the address of its data."""
    return _call(e, I64, function, frame)


@emitted(types.int64)
def poll(e, function, items, count, timeout_ms):
    return e.sext(_call(e, I32, function, items, e.trunc(count, I32), timeout_ms), I64)


@jit
def send_on(function, socket, data, nbytes, flags):
    """Sends a frame after a message's first, for which there is room."""
    tries = RETRIES
    while send(function, socket, data, nbytes, flags) < 0 and tries > 0:
        tries -= 1


@jit
def message(api, socket, frames, flags):
    """A message: its frames, without those in excess, and how many they are; 0 where there is none. ``flags``: NOBLOCK,
    or 0 to wait for one as long as the socket's RCVTIMEO says."""
    count, tries = 0, RETRIES
    while True:
        frame = frames + min(count, FRAMES - 1) * FRAME_BYTES
        if receive(api[0].zmq_msg_recv, frame, socket, flags) < 0:
            if count == 0 or tries == 0:
                return count
            tries -= 1
            continue
        count, flags = min(count + 1, FRAMES), NOBLOCK
        if not more(api[0].zmq_msg_more, frame):
            return count


def _load() -> ctypes.CDLL | None:
    """libzmq as pyzmq uses it; None where its functions cannot be called from outside."""
    try:
        library = ctypes.CDLL(_zmq.__file__)
        library.zmq_msg_init.argtypes = library.zmq_msg_close.argtypes = [ctypes.c_void_p]
        library.zmq_msg_get.argtypes = [ctypes.c_void_p, ctypes.c_int]
        library.zmq_msg_gets.argtypes, library.zmq_msg_gets.restype = (
            [ctypes.c_void_p, ctypes.c_char_p],
            ctypes.c_char_p,
        )
        library.zmq_msg_data.argtypes, library.zmq_msg_data.restype = [ctypes.c_void_p], ctypes.c_void_p
        library.zmq_msg_size.argtypes, library.zmq_msg_size.restype = [ctypes.c_void_p], ctypes.c_size_t
        for name in FUNCTIONS:
            API[name] = ctypes.cast(library[name], ctypes.c_void_p).value
    except (OSError, AttributeError):
        return None
    return library


_library = _load()
AVAILABLE = _library is not None


class Frames:
    """Room for the frames of a message, at the address ``place``."""

    def __init__(self):
        self._memory = np.zeros(FRAMES * FRAME_BYTES, np.uint8)
        self.place = self._memory.ctypes.data
        self._places = [self.place + i * FRAME_BYTES for i in range(FRAMES)]
        for place in self._places:
            _library.zmq_msg_init(place)
        weakref.finalize(self, _close, self._memory, self._places)

    def first(self, count: int) -> list[Frame]:
        """What is in the first of them, until the next message comes."""
        return [Frame(place) for place in self._places[:count]]


def _close(memory: np.ndarray, places: list[int]) -> None:
    for place in places:
        _library.zmq_msg_close(place)


class Frame:
    """A frame as a `zmq.Frame` tells of it."""

    def __init__(self, place: int):
        self._place = place
        self.bytes = ctypes.string_at(_library.zmq_msg_data(place), _library.zmq_msg_size(place))

    def __len__(self) -> int:
        return len(self.bytes)

    @property
    def buffer(self) -> memoryview:
        return memoryview(self.bytes)

    def get(self, option: int | str) -> int | str:
        """Raises ZMQError for a message that has no such property."""
        if isinstance(option, str):
            value = _library.zmq_msg_gets(self._place, option.encode())
            found, value = value is not None, value and value.decode()
        else:
            value = _library.zmq_msg_get(self._place, option)
            found = value >= 0
        if not found:
            raise zmq.ZMQError()
        return value
