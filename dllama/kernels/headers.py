"""Headers of messages that compiled code makes, and knows again: a prefix in msgpack, and numbers behind it."""

import numpy as np
from numba import types

from dllama.kernels.emit import I8, I32, const, emitted
from dllama.kernels.jit import jit

ROOM = 64
"""Bytes of the longest header."""


class Prefix:
    """Room for a header, at ``address``, whose beginning is the same for a while."""

    def __init__(self):
        self._room = np.zeros(ROOM, np.uint8)
        self.address = self._room.ctypes.data

    def write(self, prefix: bytes) -> int:
        """What headers begin with from now on; the bytes of it."""
        self._room[: len(prefix)] = np.frombuffer(prefix, np.uint8)
        return len(prefix)


@emitted(types.boolean)
def same(e, a, b, nbytes):
    """Whether the bytes at two addresses are the same."""
    a, b = (e.inttoptr(each, I8.as_pointer()) for each in (a, b))
    return e.builder.icmp_signed("==", e.call("memcmp", I32, a, b, nbytes), const(I32, 0))


@emitted()
def _put(e, place, byte):
    e.store(e.trunc(byte, I8), place)


@jit
def put_number(place, number):
    """Writes a number below 65,536 as msgpack does; the bytes of it."""
    if number < 128:
        _put(place, number)
        return 1
    if number < 256:
        _put(place, 0xCC)
        _put(place + 1, number)
        return 2
    _put(place, 0xCD)
    _put(place + 1, number >> 8)
    _put(place + 2, number & 255)
    return 3


@jit
def numbered(prefix, nbytes, stop):
    """Completes the header of a message about a stop, of which ``nbytes`` are there; its bytes."""
    nbytes += put_number(prefix + nbytes, stop.layer)
    return nbytes + put_number(prefix + nbytes, stop.product)
