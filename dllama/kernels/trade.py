"""An exchange in one piece: parts are encoded, sent, received and summed without Python in between.

The weights that a node reads between two exchanges sweep everything else out of the caches, and what Python runs
through for a message takes several times as long as the message itself.

Nodes come in groups, one for each round of an exchange. A part's header is a prefix, the same for a step, and the
number of its round in msgpack, which counts on over the exchanges.
"""

import numpy as np

from dllama.kernels.clock import nanoseconds, sched_yield
from dllama.kernels.emit import emitted
from dllama.kernels.headers import put_number, same
from dllama.kernels.jit import jit
from dllama.kernels.libzmq import API, FRAME_BYTES, ITEM, MORE, NOBLOCK, message, of_frame, poll, send, send_on
from dllama.kernels.travel import decode_sum, encode

WAIT_MS = 100
"""How long to wait for these sockets alone, which have it as their RCVTIMEO; others want to be looked after too."""

LATE, OTHER, FAILED = 1, 2, 3
"""Why `trade` stops: parts do not come in time; a message is something else; one cannot be sent."""

NODE = np.dtype(
    [(name, np.int64) for name in ("socket", "id", "id_bytes", "slot", "sends", "expects", "due", "missing")]
)
"""A node that is met in a round. Where its messages come and go; its routing id, of no bytes at a DEALER; where its
part belongs; whether it gets this node's part, and whether its own is expected; in which round that is due, and whether
it is still to come."""
GROUP = np.dtype([(name, np.int64) for name in ("nodes", "items", "sources")])
"""Where in these arrays a group begins; the last one only ends."""
STATE = np.dtype(
    [(name, np.int64) for name in ("prefix", "prefix_bytes", "part", "round", "clock", "sent", "received", "spent_ns")]
    + [(name, np.int64) for name in ("usual_ns", "spin_ns", "frames", "item", "count", "stop")]
)
"""The prefix, and room for the rest of a header after it; where this node's part goes; the round; which clock; the
bytes sent and received, and the time in exchanges; how long parts usually take, and for how long to ask for them again
and again; room for frames, and what they are if the message is something else: the number of the socket, and how many
there are (where sending fails, whom it fails to); why it has stopped."""


@emitted()
def _copy(e, target, source, nbytes):
    e.copy(target, source, nbytes)


@jit
def _header(state, number):
    """Completes the header with a round's number; the bytes of all of it."""
    return state.prefix_bytes + put_number(state.prefix + state.prefix_bytes, number)


@jit
def _post(api, nodes, first, last, state, nbytes):
    """Sends this node's part to some of the nodes, up to one that does not take it: the number of that one."""
    function, header = api[0].zmq_send, _header(state, state.round)
    for i in range(first, last):
        node = nodes[i]
        if not node.sends:
            continue
        if node.id_bytes:
            if send(function, node.socket, node.id, node.id_bytes, MORE) < 0:
                return i
            send_on(function, node.socket, state.prefix, header, MORE)
        elif send(function, node.socket, state.prefix, header, MORE) < 0:
            return i
        send_on(function, node.socket, state.part, nbytes, NOBLOCK)
        state.sent += header + nbytes
    return last


@jit
def _sort_in(api, nodes, socket, state, count, nbytes):
    """Puts a part that is due in its slot, and returns whose it is. -1 for anything else."""
    size, data = api[0].zmq_msg_size, api[0].zmq_msg_data
    for i in range(len(nodes)):
        node = nodes[i]
        frame = state.frames
        if node.socket != socket or count != 2 + (node.id_bytes > 0):
            continue
        if node.id_bytes:
            if of_frame(size, frame) != node.id_bytes or not same(of_frame(data, frame), node.id, node.id_bytes):
                continue
            frame += FRAME_BYTES
        header = _header(state, node.due)
        if not node.missing or of_frame(size, frame) != header or of_frame(size, frame + FRAME_BYTES) != nbytes:
            continue
        if not same(of_frame(data, frame), state.prefix, header):
            continue
        _copy(node.slot, of_frame(data, frame + FRAME_BYTES), nbytes)
        node.missing = 0
        state.received += header + nbytes
        return i
    return -1


@jit
def _take(api, nodes, first, last, items, first_item, last_item, state, nbytes):
    """Takes in the parts of some of the nodes, and what comes early of others: 0, LATE or OTHER.

    First it asks again and again and offers the CPU to ZeroMQ's own threads in between: on a fast network the answer is
    on its way, and to be woken up for it takes as long as it takes itself. Where messages usually take longer it leaves
    the CPU to whoever can use it. It then waits in the call that receives, which asks the system half as often as a
    poll before it, where all come from one socket.
    """
    due = 0
    for i in range(first, last):
        due += nodes[i].missing
    if due == 0:
        return 0
    one = last_item - first_item == 1
    waits = one and state.usual_ns >= state.spin_ns
    start = now = nanoseconds(state.clock)
    while due:
        found = False
        for i in range(first_item, last_item):
            count = message(api, items[i].socket, state.frames, 0 if waits else NOBLOCK)
            if count:
                node = _sort_in(api, nodes, items[i].socket, state, count, nbytes)
                if node < 0:
                    state.item, state.count = i, count
                    return OTHER
                found = True
                due -= first <= node < last
                if due == 0:
                    break
        now = nanoseconds(state.clock)
        if found:
            continue
        if state.usual_ns < state.spin_ns and now - start < state.spin_ns:
            sched_yield()
        elif one and not waits:
            waits = True
        elif one or poll(api[0].zmq_poll, items.ctypes.data + 16 * first_item, last_item - first_item, WAIT_MS) <= 0:
            state.usual_ns += (2 * state.spin_ns - state.usual_ns) // 16
            return LATE
    state.usual_ns += (min(now - start, 2 * state.spin_ns) - state.usual_ns) // 16
    return 0


@jit
def _rounds(tag, api, nodes, items, sources, groups, state, first, last, posted, x, stride, rows, columns, nbytes):
    rounds = len(groups) - 1
    for g in range(first, last):
        group, end = groups[g], groups[g + 1]
        if not posted:
            encode(tag, x, stride, rows, columns, state.part)
            state.count = _post(api, nodes, group.nodes, end.nodes, state, nbytes)
            if state.count < end.nodes:
                return FAILED
        posted = False
        stop = _take(api, nodes, group.nodes, end.nodes, items, group.items, end.items, state, nbytes)
        if stop:
            return stop
        if group.sources < end.sources:
            decode_sum(tag, sources[group.sources : end.sources], x, stride, rows, columns)
        for i in range(group.nodes, end.nodes):
            nodes[i].due += rounds
            nodes[i].missing = nodes[i].expects
        state.round += 1
    return 0


@jit
def trade(tag, api, nodes, items, sources, groups, states, first, last, posted, x, stride, rows, columns, nbytes):
    """Rounds ``first`` to ``last`` of an exchange of rows of floats at ``x``: 0, or the reason why it stops in a round.

    ``posted``: whether the first round's part has been sent.
    """
    start = nanoseconds(states[0].clock)
    stop = _rounds(
        tag, api, nodes, items, sources, groups, states[0], first, last, posted, x, stride, rows, columns, nbytes
    )
    states[0].stop = stop
    states[0].spent_ns += nanoseconds(states[0].clock) - start
    return stop


def example(tag) -> tuple:
    """Arguments of the types that `trade` gets before ``first``."""
    return tag, API, np.zeros(1, NODE), np.zeros(1, ITEM), np.zeros(1, np.int64), np.zeros(2, GROUP), np.zeros(1, STATE)
