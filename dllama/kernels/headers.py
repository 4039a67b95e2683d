"""Headers of messages that compiled code makes, and knows again: a prefix in msgpack, and numbers behind it."""

from numba import types

from dllama.kernels.emit import I8, I32, const, emitted
from dllama.kernels.jit import jit


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
