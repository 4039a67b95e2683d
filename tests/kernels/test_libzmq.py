"""libzmq's functions in compiled code, where something comes in between."""

import ctypes

import pytest

from dllama.kernels import libzmq

pytestmark = pytest.mark.skipif(not libzmq.AVAILABLE, reason="libzmq cannot be called from outside pyzmq")


@pytest.mark.parametrize(("interrupted", "expected"), [((), 2), ((1,), 2), ((1, 2, 3), 2), ((0,), 0)])
def test_a_signal_in_the_middle_of_a_message(interrupted, expected):
    """What is left of it is not taken for another. ``interrupted``: the numbers of calls that a signal ends."""
    calls, received = [], []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_int)
    def receive(frame, socket, flags):
        calls.append(flags)
        if len(calls) - 1 in interrupted:
            return -1
        received.append(frame)
        return 0

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    def more(frame):
        return len(received) < 2

    api, frames = libzmq.API.copy(), libzmq.Frames()
    for name, function in (("zmq_msg_recv", receive), ("zmq_msg_more", more)):
        api[name] = ctypes.cast(function, ctypes.c_void_p).value
    assert libzmq.message(api, 0, frames.place, libzmq.NOBLOCK) == expected
    assert received == [frames.place + i * libzmq.FRAME_BYTES for i in range(expected)]
