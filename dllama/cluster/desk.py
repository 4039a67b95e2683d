"""A worker's talk with others: with its root, one at a time; with the workers of its cluster; and with strangers."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress

from dllama import __version__
from dllama.cluster import wire
from dllama.cluster.hub import Hub
from dllama.cluster.links import Link, LinkLost
from dllama.cluster.listener import Listener, Peer

MOST_LATER = 1000
"""Messages of the root that wait for the end of a pass."""


class RootGone(Exception):
    """The root has left, or is lost: how, for people."""


class Superseded(Exception):
    """The root wants something else than what is being done: ``message`` and ``payload``."""

    def __init__(self, message, payload):
        super().__init__()
        self.message, self.payload = message, payload


class Desk:
    """Receives for a worker, and answers by itself all that is no business of the model at work.

    ``welcome()`` makes the answer to a root; ``notify`` is called with a line for what happens. ``root``: the one that
    is served, and ``session`` its cluster's; ``hub``: where links to other workers belong; ``joined``: the workers that
    have called, by epoch and node
    """

    def __init__(self, listener: Listener, welcome: Callable[[], wire.Welcome], notify: Callable[[str], None]):
        self.hub = Hub(listener)
        self.root: Peer | None = None
        self.joined: dict[tuple[int, int], Peer] = {}
        self.session = b""
        self._later: deque[tuple] = deque()  # what the root has said during a pass, of the next ones
        self._caller: tuple[Peer, wire.Hello] | None = None  # came when the root before it had just gone
        self._listener, self._welcome, self._notify = listener, welcome, notify

    def wait_for_root(self, idle_seconds: float, idle: Callable[[], None]) -> None:
        """Returns when there is one. ``idle`` is called when none has come for so many seconds."""
        if self._caller is not None:
            caller, self._caller = self._caller, None
            self._greet(*caller)
        due: float | None = time.monotonic() + idle_seconds
        while self.root is None:
            left = None if due is None else due - time.monotonic()
            if left is not None and left <= 0:
                idle()
                due = left = None
            with suppress(LinkLost):
                self.receive(None if left is None else 1e3 * left)

    def leave_root(self) -> None:
        """Nothing of it is left: the next one may come."""
        _answer(self.root, wire.Bye())
        self.root, self.session, self.joined = None, b"", {}
        self._later.clear()

    def tell(self, message, *payload) -> None:
        """Sends something to the root. Raises RootGone."""
        try:
            self.root.send(wire.encode(message, *payload))
        except LinkLost as lost:
            raise RootGone(f"the root is lost: {lost.reason}") from None

    def next(
        self,
        keep: Callable = lambda source, message, frames: None,
        look: Callable[[], float | None] = lambda: None,
    ) -> tuple:
        """What the root says next: message and payload. Raises RootGone.

        ``keep(source, message, frames)`` is called with what others say of a step meanwhile; ``look()`` now and then:
        it returns in how many milliseconds it wants to be called again, None where the next message is soon enough.
        """
        if self._later:
            return self._later.popleft()
        while True:
            try:
                received = self.receive(look())
            except LinkLost:
                continue  # another worker's; who needs the link will notice
            if received is None:
                continue
            source, message, frames = received
            if source is self.root:
                return message, frames[1:]
            keep(source, message, frames)

    def receive(self, timeout_ms: float | None) -> tuple | None:
        """Source, message and frames of what comes next, where it concerns the model: from the root, from a link of
        this worker's, or a part of a step. None after the timeout, and for all that is dealt with here.

        Raises RootGone, and LinkLost for all others.
        """
        try:
            received = self.hub.receive(timeout_ms)
        except LinkLost as lost:
            if lost.source is self.root:
                raise RootGone(f"the root is lost: {lost.reason}") from None
            raise
        if received is None:
            return None
        source, frames = received
        try:
            message, payload = wire.decode(frames)
        except wire.WireError as error:
            self._notify(f"{source.name} sent what is no message: {error}")
            if isinstance(source, Peer):
                _answer(source, wire.Refuse(wire.line(str(error))))
            return None
        if isinstance(source, Link) or type(message) in (wire.Part, wire.Candidates):
            return source, message, frames
        if source is self.root and type(message) not in (wire.Beat, wire.Bye, wire.Probe):
            return source, message, frames
        self.other(source, message, payload)
        return None

    def other(self, source, message, payload) -> None:
        """What is no part of a step. Raises Superseded for the root's wishes, and RootGone where it leaves."""
        if source is self.root:
            self._hear(message, payload)
        elif type(message) is wire.Join and self.root is not None and message.session == self.session:
            self.joined = {place: peer for place, peer in self.joined.items() if place[0] >= message.epoch}
            self.joined[message.epoch, message.index] = source
            _answer(source, wire.Joined(message.epoch, message.index))
        elif type(message) is wire.Hello:
            self._greet(source, message)

    def _hear(self, message, payload) -> None:
        """What the root says."""
        if type(message) is wire.Bye:
            raise RootGone("the root has left")
        if type(message) is wire.Probe:
            _answer(self.root, message)
        elif type(message) in (wire.Pass, wire.Adapt):  # a root waits for no node's end of a pass
            if len(self._later) == MOST_LATER:
                raise RootGone("the root asks for more than can be done")
            self._later.append((message, payload))
        elif type(message) is not wire.Beat:
            self._later.clear()
            raise Superseded(message, payload)

    def _greet(self, source: Peer, message: wire.Hello) -> None:
        """A root has come. Raises RootGone where the one before it turns out to be gone; then it is greeted next."""
        if message.version != __version__:
            reason = f"this worker runs dllama {__version__} and the root {message.version}: install the same on both"
            _answer(source, wire.Refuse(reason))
            self._notify(f"refused a root of another version, {message.version}")
        elif message.role != "root":
            reason = "this worker is part of a cluster; a cloud for edges is started with --device and --model"
            _answer(source, wire.Refuse(reason))
            self._notify(f"refused an edge, {source.name}")
        elif self.root is None:
            self.root, self.session = source, message.session
            self._notify(f"a root has come, {source.name}")
            _answer(source, self._welcome())
        else:
            self._refuse(source, message)

    def _refuse(self, source: Peer, message: wire.Hello) -> None:
        """There is a root already."""
        self._listener.watch()
        if self.root.lost:
            self._caller = source, message
            raise RootGone(f"the root is lost: {self.root.lost}")
        if message.session == self.session:
            _answer(source, wire.Refuse("it takes part already: the same worker is given twice"))
        else:
            _answer(source, wire.Refuse("this worker is busy with another root; try again later"))
            self._notify(f"refused a second root, {source.name}")


def _answer(peer: Peer, message) -> None:
    with suppress(LinkLost):  # gone already
        peer.send(wire.encode(message))
