"""A stop of PrivateLoRA at the cloud in one piece: A·x goes to an edge, and its answer is taken in.

The weights that are read between two stops sweep everything else out of the caches: what Python runs through for a
message takes several times as long as the message itself.
"""

import numpy as np

from dllama.kernels import tags
from dllama.kernels.clock import nanoseconds, sched_yield
from dllama.kernels.headers import put_number, same
from dllama.kernels.jit import jit
from dllama.kernels.libzmq import API, FRAME_BYTES, MORE, NOBLOCK, message, of_frame, send, send_on
from dllama.kernels.stop import pack, unpack

FORMS = (tags.F32, tags.F16, tags.Q80)
"""Values travel in one of these, which is known by its place here."""

DONE, LATE, OTHER, UNFIT, LONG = range(5)
"""Why a talk stops: all stops are behind it; the answer does not come in time; a message is something else, or not fit
to be one; A·x is not fit to be sent; it has gone on for long enough, and the last answer is there."""

STOP = np.dtype([(name, np.int64) for name in ("half", "layer", "product", "first", "count")])
"""The half that makes its A·x, and the targets that travel: where in ``picked`` they are."""
TALK = np.dtype(
    [(name, np.int64) for name in ("next", "stop", "form", "rows", "r_c2d", "r_d2c", "socket", "id", "id_bytes")]
    + [(name, np.int64) for name in ("low", "low_bytes", "answer", "answer_bytes", "frames", "count")]
    + [(name, np.int64) for name in ("clock", "until_ns", "spin_ns", "usual_ns", "waited_ns", "blocks")]
)
"""The stop that comes next, and why the talk has stopped; a place in FORMS; rows; the ranks; where messages come and
go, and the edge's routing id; what the headers of both messages begin with, and room for the rest; room for frames, and
how many there are; which clock, and when the talk has gone on for long enough; how long to ask for an answer again and
again, how long it usually takes, and how long all have taken; whether the system may be asked to wait for it."""


@jit
def _pack(form, values, picked, rank, room, out):
    if form == 0:
        return pack(tags.F32, values, picked, rank, room, out)
    if form == 1:
        return pack(tags.F16, values, picked, rank, room, out)
    return pack(tags.Q80, values, picked, rank, room, out)


@jit
def _unpack(form, data, values, picked, rank, room):
    if form == 0:
        return unpack(tags.F32, data, values, picked, rank, room)
    if form == 1:
        return unpack(tags.F16, data, values, picked, rank, room)
    return unpack(tags.Q80, data, values, picked, rank, room)


@jit
def _row_bytes(form, width):
    """Of values as they travel."""
    blocks = (width + 31) // 32
    return 4 * width if form == 0 else 64 * blocks if form == 1 else 34 * blocks


@jit
def _numbered(prefix, nbytes, stop):
    """Completes a header; its bytes."""
    nbytes += put_number(prefix + nbytes, stop.layer)
    return nbytes + put_number(prefix + nbytes, stop.product)


@jit
def _tell(api, talk, stop, low, picked, room, out):
    """A·x to the edge; False where it is not fit. Whether the edge is still there others find out."""
    rank = talk.r_c2d
    if not _pack(talk.form, low[: talk.rows], picked[stop.first : stop.first + stop.count], rank, room, out):
        return False
    function, header = api[0].zmq_send, _numbered(talk.low, talk.low_bytes, stop)
    if send(function, talk.socket, talk.id, talk.id_bytes, MORE) >= 0:
        send_on(function, talk.socket, talk.low, header, MORE)
        send_on(function, talk.socket, out.ctypes.data, talk.rows * _row_bytes(talk.form, stop.count * rank), NOBLOCK)
    return True


@jit
def _heard(api, talk, talks):
    """A message of any kind in the frames, if one comes in time: how many frames. It asks as `trade` does."""
    waits = talk.blocks and talk.usual_ns >= talk.spin_ns
    start = nanoseconds(talk.clock)
    while True:
        count = message(api, talk.socket, talk.frames, 0 if waits else NOBLOCK)
        spent = nanoseconds(talk.clock) - start
        if count or waits or (talk.usual_ns >= talk.spin_ns and not talk.blocks):
            break
        if spent < talk.spin_ns:
            sched_yield()
        elif talk.blocks:
            waits = True
        else:
            break
    talks[0].waited_ns += spent
    spent = min(spent, 2 * talk.spin_ns) if count else 2 * talk.spin_ns
    talks[0].usual_ns += (spent - talk.usual_ns) // 16
    return count


@jit
def _is_answer(api, talk, stop, nbytes, count):
    size, data = api[0].zmq_msg_size, api[0].zmq_msg_data
    header, payload = talk.frames + FRAME_BYTES, talk.frames + 2 * FRAME_BYTES
    if count != 3 or of_frame(size, talk.frames) != talk.id_bytes or of_frame(size, payload) != nbytes:
        return False
    expected = _numbered(talk.answer, talk.answer_bytes, stop)
    if of_frame(size, header) != expected or not same(of_frame(data, header), talk.answer, expected):
        return False
    return same(of_frame(data, talk.frames), talk.id, talk.id_bytes)


@jit
def talk_at(half, arguments):
    """What there is to say behind a half: A·x, or the answer to take in. Whether the talk stops there; before its first
    and after its last stop there is nothing to say."""
    api, stops, talks, picked, low, room, out = arguments
    talk = talks[0]
    if talk.next >= len(stops):
        return False
    stop = stops[talk.next]
    if half == stop.half:
        talks[0].stop = UNFIT
        return not _tell(api, talk, stop, low, picked, room, out)
    if half != stop.half + 1:
        return False
    nbytes = talk.rows * _row_bytes(talk.form, stop.count * talk.r_d2c)
    count = _heard(api, talk, talks)
    talks[0].count, talks[0].stop = count, OTHER if count else LATE
    if not count or not _is_answer(api, talk, stop, nbytes, count):
        return True
    data = of_frame(api[0].zmq_msg_data, talk.frames + 2 * FRAME_BYTES)
    chosen = picked[stop.first : stop.first + stop.count]
    if not _unpack(talk.form, data, low[: talk.rows], chosen, talk.r_d2c, room):
        return True
    talks[0].next += 1
    talks[0].stop = LONG if talks[0].next < len(stops) else DONE
    return talks[0].stop == LONG and nanoseconds(talk.clock) > talk.until_ns


def example() -> tuple:
    """Arguments of the types that `talk_at` gets; nothing is said with them."""
    low = np.zeros((1, 1, 2), np.float32)[:, :, :1]  # part of a larger array
    room, out = np.zeros(1, np.float32), np.zeros(1, np.uint8)
    return API, np.zeros(0, STOP), np.zeros(1, TALK), np.zeros(1, np.int64), low, room, out
