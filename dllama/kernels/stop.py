"""What travels at a stop of PrivateLoRA, compiled: from values in an array to bytes and back, all of them looked at.

A row is the values of some targets of a product, ``rank`` of each, one after another, as bytes as `travel` has it. In
the array each target of the product has its place, adapted or not. These take arrays instead of addresses, as a call
then costs the least Python: between two passes over the weights its own caches are cold.
"""

import numpy as np
from numba import types

from dllama.kernels import tags
from dllama.kernels.emit import F32, const, emitted
from dllama.kernels.jit import jit
from dllama.kernels.travel import decode_sum, encode, row_bytes

FINITE = np.finfo(np.float32).max
LIMITS = {tags.F16: np.float32(65504.0), tags.Q80: np.float32(65504.0 * 127)}


@emitted(types.float32)
def largest(e, form):
    """What a value that travels can be. F16's infinities and NaN, a block's scale included, are read as larger numbers
    by kernels that convert halves themselves."""
    return const(F32, LIMITS.get(form, FINITE))


@jit
def pack(form, values, picked, rank, room, out):
    """Rows of values, float32 [rows, targets, rank at least], as bytes, uint8; ``picked``: int64, targets that travel.

    room: float32, for one row, filled up to a multiple of 32

    False where a value is infinite or no number.
    """
    width = len(picked) * rank
    nbytes = row_bytes(form, width)
    for i in range(width, (width + 31) // 32 * 32):
        room[i] = 0
    for row in range(len(values)):
        for k, target in enumerate(picked):
            for i in range(rank):
                value = values[row, target, i]
                if not abs(value) <= FINITE:
                    return False
                room[k * rank + i] = value
        encode(form, room.ctypes.data, 0, 1, width, out.ctypes.data + row * nbytes)
    return True


@jit
def unpack(form, data, values, picked, rank, room):
    """The other way, from the address ``data``; what is not picked stays as it is."""
    width, source = len(picked) * rank, np.empty(1, np.int64)
    nbytes = row_bytes(form, width)
    for row in range(len(values)):
        source[0] = data + row * nbytes
        decode_sum(form, source, room.ctypes.data, 0, 1, width)
        for k, target in enumerate(picked):
            for i in range(rank):
                value = room[k * rank + i]
                if not abs(value) <= largest(form):
                    return False
                values[row, target, i] = value
    return True
