"""A stop of PrivateLoRA at the cloud in one piece: A·x goes to edges, and their answers are taken in.

The weights that are read between two stops sweep everything else out of the caches: what Python runs through for a
message takes several times as long as the message itself.
"""

import numpy as np

from dllama.kernels import tags
from dllama.kernels.clock import nanoseconds
from dllama.kernels.headers import numbered, same
from dllama.kernels.jit import jit
from dllama.kernels.libzmq import API, FRAME_BYTES, MORE, NOBLOCK, of_frame, send, send_on
from dllama.kernels.stop import pack, unpack
from dllama.kernels.travel import row_bytes
from dllama.kernels.waiting import WAIT, heard

FORMS = (tags.F32, tags.F16, tags.Q80)
"""Values travel in one of these, which is known by its place here."""

WAITED_FOR, ANSWERED, UNFIT = range(3)
"""Where an edge is: its answer is awaited, or there; or its A·x is not fit to be sent."""

STOP = np.dtype([(name, np.int64) for name in ("half", "layer", "product", "first", "count")])
"""The half that makes its A·x, and the targets that travel: where in ``picked`` they are."""
EDGE = np.dtype(
    [(name, np.int64) for name in ("state", "first_row", "rows", "form", "r_c2d", "r_d2c", "id", "id_bytes")]
    + [(name, np.int64) for name in ("low", "low_bytes", "answer", "answer_bytes")]
)
"""An edge: its rows in the batch; a place in FORMS; the ranks; the routing id; what the headers of both messages begin
with, and room for the rest."""
TALK = np.dtype(WAIT + [(name, np.int64) for name in ("told", "count", "until_ns", "waited_ns")])
"""What edges share: how they are waited for; the last stop that they were told of; how many frames a message has that
is none of the answers, or not fit to be one, and 0 where none came; when the talk has gone on for long enough; and how
long all waiting has taken."""


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
    if form == 0:
        return row_bytes(tags.F32, width)
    if form == 1:
        return row_bytes(tags.F16, width)
    return row_bytes(tags.Q80, width)


@jit
def _tell(api, talk, edge, stop, low, picked, room, out):
    """A·x to an edge; False where it is not fit. Whether the edge is still there others find out."""
    rank, values = edge.r_c2d, low[edge.first_row : edge.first_row + edge.rows]
    if not _pack(edge.form, values, picked[stop.first : stop.first + stop.count], rank, room, out):
        return False
    function, header = api[0].zmq_send, numbered(edge.low, edge.low_bytes, stop)
    if send(function, talk.socket, edge.id, edge.id_bytes, MORE) >= 0:
        send_on(function, talk.socket, edge.low, header, MORE)
        send_on(function, talk.socket, out.ctypes.data, edge.rows * _row_bytes(edge.form, stop.count * rank), NOBLOCK)
    return True


@jit
def _is_answer(api, talk, edge, stop, count):
    """Whether the message in the frames is the answer that an edge owes."""
    size, data = api[0].zmq_msg_size, api[0].zmq_msg_data
    header, payload = talk.frames + FRAME_BYTES, talk.frames + 2 * FRAME_BYTES
    if count != 3 or edge.state != WAITED_FOR or of_frame(size, talk.frames) != edge.id_bytes:
        return False
    if not same(of_frame(data, talk.frames), edge.id, edge.id_bytes):
        return False
    expected = numbered(edge.answer, edge.answer_bytes, stop)
    if of_frame(size, header) != expected or not same(of_frame(data, header), edge.answer, expected):
        return False
    return of_frame(size, payload) == edge.rows * _row_bytes(edge.form, stop.count * edge.r_d2c)


@jit
def _take(api, talk, edges, stop, count, low, picked, room):
    """Takes in an answer; False where the message is none, or not fit."""
    for i in range(len(edges)):
        edge = edges[i]
        if _is_answer(api, talk, edge, stop, count):
            data = of_frame(api[0].zmq_msg_data, talk.frames + 2 * FRAME_BYTES)
            values, chosen = low[edge.first_row : edge.first_row + edge.rows], picked[stop.first :][: stop.count]
            if not _unpack(edge.form, data, values, chosen, edge.r_d2c, room):
                return False
            edges[i].state = ANSWERED
            return True
    return False


@jit
def _hear(api, talks, edges, stop, low, picked, room):
    """Takes in all answers; False where one does not come in time, or something else does."""
    awaited = 0
    for i in range(len(edges)):
        if edges[i].state == UNFIT:
            return False
        awaited += edges[i].state == WAITED_FOR
    start = nanoseconds(talks[0].clock)
    while awaited:
        count = heard(api, talks, start, len(edges) == 1)
        if not count or not _take(api, talks[0], edges, stop, count, low, picked, room):
            talks[0].count = count
            break
        awaited -= 1
    talks[0].waited_ns += nanoseconds(talks[0].clock) - start
    return awaited == 0


@jit
def talk_at(half, arguments):
    """What there is to say behind a half: A·x, or the answers to take in. Whether the talk stops there, always behind a
    product. Where no stop is there is nothing to say."""
    api, stops, talks, edges, picked, low, room, out = arguments
    talk = talks[0]
    if talk.told + 1 < len(stops) and half == stops[talk.told + 1].half:
        talks[0].told += 1
        for i in range(len(edges)):
            fit = _tell(api, talk, edges[i], stops[talk.told], low, picked, room, out)
            edges[i].state = WAITED_FOR if fit else UNFIT
    elif 0 <= talk.told < len(stops) and half == stops[talk.told].half + 1:
        if not _hear(api, talks, edges, stops[talk.told], low, picked, room):
            return True
        return talk.told + 1 < len(stops) and nanoseconds(talk.clock) > talk.until_ns
    return False


def example() -> tuple:
    """Arguments of the types that `talk_at` gets; nothing is said with them."""
    low = np.zeros((1, 1, 2), np.float32)[:, :, :1]  # part of a larger array
    room, out = np.zeros(1, np.float32), np.zeros(1, np.uint8)
    return API, np.zeros(0, STOP), np.zeros(1, TALK), np.zeros(1, EDGE), np.zeros(1, np.int64), low, room, out
