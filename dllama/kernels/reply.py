"""The edge's side of a step of PrivateLoRA in one piece: each A·x that comes is answered, as long as they come as they
should. See `talk` for the cloud's side.
"""

import numpy as np

from dllama.kernels.answer import answer
from dllama.kernels.clock import nanoseconds
from dllama.kernels.elementwise import floats
from dllama.kernels.headers import numbered, same
from dllama.kernels.jit import jit
from dllama.kernels.libzmq import API, FRAME_BYTES, MORE, NOBLOCK, of_frame, send, send_on
from dllama.kernels.travel import row_bytes
from dllama.kernels.waiting import WAIT, heard

STOP = np.dtype([(name, np.int64) for name in ("layer", "product", "targets", "m", "x_stride", "y_stride")])
"""How many targets travel, the address of their M, and what lies between rows of the buffers; as of `answer`."""
REPLY = np.dtype(
    WAIT
    + [(name, np.int64) for name in ("next", "count", "rows", "r_c2d", "r_d2c", "low", "low_bytes")]
    + [(name, np.int64) for name in ("answer", "answer_bytes", "x", "y", "waited_ns", "sent", "received")]
)
"""How the cloud is waited for; the stop that comes next, and how many frames a message has that is not its A·x; rows;
the ranks; what the headers of both messages begin with, and room for the rest; addresses of buffers as of `answer`; how
long all waiting has taken; bytes."""


@jit
def _is_low(api, state, stop, nbytes):
    size, data = api[0].zmq_msg_size, api[0].zmq_msg_data
    expected = numbered(state.low, state.low_bytes, stop)
    if state.count != 2 or of_frame(size, state.frames + FRAME_BYTES) != nbytes:
        return False
    return of_frame(size, state.frames) == expected and same(of_frame(data, state.frames), state.low, expected)


@jit
def _post(api, state, stop, out, nbytes):
    """The answer to the cloud; False where it does not take it."""
    function, header = api[0].zmq_send, numbered(state.answer, state.answer_bytes, stop)
    if send(function, state.socket, state.answer, header, MORE) < 0:
        return False
    send_on(function, state.socket, out.ctypes.data, nbytes, NOBLOCK)
    state.sent += header + nbytes
    return True


@jit
def reply(form, api, stops, states, source, out):
    """Answers at one stop after the other. It ends behind the last; where nothing comes in time; and with a message
    that is not the A·x of the next stop, not fit to be answered, or whose answer cannot be sent.

    source: int64 [1], which it writes;  out: uint8, room for an answer
    """
    state = states[0]
    while state.next < len(stops):
        stop, start = stops[state.next], nanoseconds(state.clock)
        state.count = heard(api, states, start, True)
        state.waited_ns += nanoseconds(state.clock) - start
        nbytes = state.rows * row_bytes(form, stop.targets * state.r_c2d)
        if not state.count or not _is_low(api, state, stop, nbytes):
            return
        source[0] = of_frame(api[0].zmq_msg_data, state.frames + FRAME_BYTES)
        floats(state.y, state.rows * stop.y_stride // 4)[:] = 0
        if not answer(
            form, source, state.rows, stop.targets, state.r_c2d, state.r_d2c, stop.m,
            state.x, stop.x_stride, state.y, stop.y_stride, out.ctypes.data,
        ):  # fmt: skip
            return
        if not _post(api, state, stop, out, state.rows * row_bytes(form, stop.targets * state.r_d2c)):
            return
        state.received += numbered(state.low, state.low_bytes, stop) + nbytes
        state.next, state.count = state.next + 1, 0


def example() -> tuple:
    """Arguments of the types that `reply` gets after ``form``."""
    return API, np.zeros(0, STOP), np.zeros(1, REPLY), np.zeros(1, np.int64), np.zeros(1, np.uint8)
