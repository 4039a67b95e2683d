"""The edge's part of a product of PrivateLoRA, compiled: M·A·x out of A·x, from bytes to bytes.

Rows of A·x travel as `travel` has it, the values of a product's targets one after another in each row.
"""

import numpy as np

from dllama.kernels import tags
from dllama.kernels.dot import multiply_rows
from dllama.kernels.elementwise import floats
from dllama.kernels.jit import jit
from dllama.kernels.stop import largest
from dllama.kernels.travel import decode_sum, encode

LARGEST = np.float32(3e38)


@jit
def _clear(x, nbytes):
    """Whatever the bytes held: shorter rows that come later are read a little beyond their ends."""
    floats(x, nbytes // 4)[:] = 0


@jit
def answer(form, source, rows, targets, r_in, r_out, m, x, x_stride, y, y_stride, out):
    """The bytes at ``out``: for each row and target M·(A·x), with A·x from the bytes at ``source``, int64 [1].

    m: address of float32 [targets, r_out, r_in], and of 16 more values;  x, y: of room for the rows as float32, with
    16 values more at the end, x_stride and y_stride bytes apart, zero beyond their values

    False where a value, given or found, is infinite or no number; nothing is written then.
    """
    width = targets * r_in
    decode_sum(form, source, x, x_stride, rows, width)
    for row in range(rows):
        values = floats(x + row * x_stride, width)
        for i in range(width):
            if not abs(values[i]) <= largest(form):
                _clear(x, rows * x_stride)
                return False
        for t in range(targets):
            multiply_rows(
                tags.F32, m + 4 * t * r_out * r_in, 4 * r_in, r_out, r_in,
                x + row * x_stride + 4 * t * r_in, 0, 1, y + row * y_stride + 4 * t * r_out, 0,
            )  # fmt: skip
        answers = floats(y + row * y_stride, targets * r_out)
        for i in range(targets * r_out):
            if not abs(answers[i]) <= LARGEST:
                _clear(x, rows * x_stride)
                return False
    encode(form, y, y_stride, rows, targets * r_out, out)
    return True
