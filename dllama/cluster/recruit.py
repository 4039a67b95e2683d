"""The root's first words with its workers, and its last: are they there, of its version, free, and how strong?"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace

from dllama import __version__
from dllama.cluster import wire
from dllama.cluster.hub import Hub
from dllama.cluster.key import ClusterKey
from dllama.cluster.links import Link, LinkLost
from dllama.cluster.node import NodeSpec
from dllama.cluster.traffic import MESSAGE_SECONDS, message_seconds
from dllama.errors import ClusterError, DllamaError

GOODBYE_SECONDS = 1.0
"""How long to wait until workers that were let go are free."""
PROBES = 5
"""Small messages there and back, of which the fastest counts; then as many large ones."""
PROBE_BYTES = 256 << 10
ANSWER_TIMES = 2
"""A worker that still lets go of an earlier root takes a while to answer."""
SILENT = "it is there, but does not answer"


@dataclass(frozen=True, eq=False)
class Recruit:
    """A willing worker: its address as the user gave it, the link to it, what the plan has to know of it, and how long
    a small message there and one back take, in seconds."""

    address: str
    link: Link
    spec: NodeSpec
    round_trip: float


def recruit(
    addresses: Sequence[str], key: ClusterKey | None, session: bytes, connect_timeout: float
) -> tuple[list[Recruit], list[ClusterError]]:
    """Asks all of these workers at once: those that are willing, in the order of the addresses, and why others are not.

    ``connect_timeout``: seconds until a worker that cannot be reached is given up; one that can be has ANSWER_TIMES as
    long for each answer.
    """
    links, found, errors = {}, {}, []
    patience = ANSWER_TIMES * connect_timeout
    try:
        for address in addresses:
            try:
                link = Link(address, key, connect_timeout=connect_timeout)
                links[link] = address
                link.send(wire.encode(wire.Hello(wire.PROTOCOL, __version__, session, "root")))
            except ClusterError as error:
                errors.append(_about(address, error))
        deadline = time.monotonic() + connect_timeout + patience
        for link, welcome in _welcomes(links, deadline, errors).items():
            try:
                found[link] = _measured(links[link], link, welcome, patience)
            except DllamaError as error:
                errors.append(_about(links[link], error))
    except BaseException:
        found = {}
        raise
    finally:
        for link in links.keys() - found.keys():
            link.close()
    return sorted(found.values(), key=lambda one: addresses.index(one.address)), errors


def _welcomes(links: dict[Link, str], deadline: float, errors: list) -> dict[Link, wire.Welcome]:
    """What they answer; those that refuse, or do not, become errors."""
    hub, waiting, welcomes = Hub(*links), set(links), {}
    while waiting:
        try:
            received = hub.receive(1e3 * max(0, deadline - time.monotonic()))
        except LinkLost as lost:
            if lost.source in waiting:
                waiting.discard(lost.source)
                errors.append(_about(links[lost.source], lost))
            continue
        if received is None:
            errors += [ClusterError(f"worker {links[link]}: {SILENT}") for link in waiting]
            break
        link, frames = received
        if link in waiting:
            waiting.discard(link)
            try:
                welcomes[link] = _welcome(frames)
            except DllamaError as error:
                errors.append(_about(links[link], error))
    return welcomes


def _welcome(frames: list) -> wire.Welcome:
    """A worker's answer. Raises ClusterError and WireError where it is not willing, or is none."""
    message, _ = wire.decode(frames)
    if type(message) is not wire.Welcome:
        raise ClusterError(message.reason if type(message) is wire.Refuse else "it is no dllama worker")
    if message.version != __version__:
        raise ClusterError(f"it runs dllama {message.version} and this machine {__version__}: install the same on both")
    return message


def _measured(address: str, link: Link, welcome: wire.Welcome, patience: float) -> Recruit:
    """The worker as it describes itself, at the end of the link as it is."""
    small = min(_round_trip(link, number, b"\0", patience) for number in range(PROBES))
    large = min(_round_trip(link, number, bytes(PROBE_BYTES), patience) for number in range(PROBES, 2 * PROBES))
    bandwidth = PROBE_BYTES / max(large - small, 1e-6)
    spec = NodeSpec(address, welcome.read_speed, welcome.free_memory, welcome.threads, bandwidth)
    # What a message costs the CPU at both ends is no part of the latency: the plan counts it as well.
    latency = max(0.0, small / 2 - MESSAGE_SECONDS - message_seconds(spec))
    return Recruit(address, link, replace(spec, latency=latency), small)


def _round_trip(link: Link, number: int, payload: bytes, patience: float) -> float:
    """Seconds from sending a message to the answer."""
    start = time.perf_counter()
    link.send(wire.encode(wire.Probe(number), payload))
    while (left := start + patience - time.perf_counter()) > 0:
        frames = link.receive(1e3 * left)
        if frames and wire.decode(frames)[0] == wire.Probe(number):
            return time.perf_counter() - start
    raise ClusterError(SILENT)


def dismiss(recruits: Sequence[Recruit]) -> None:
    """Lets workers go: those that are still there say when they are free for the next root."""
    for worker in recruits:
        with suppress(LinkLost):
            worker.link.send(wire.encode(wire.Bye()))
    deadline = time.monotonic() + GOODBYE_SECONDS
    for worker in recruits:
        with suppress(LinkLost):
            while (left := deadline - time.monotonic()) > 0:
                frames = worker.link.receive(1e3 * left)
                if frames and _is_bye(frames):
                    break
        worker.link.close()


def _is_bye(frames: list) -> bool:
    try:
        return type(wire.decode(frames)[0]) is wire.Bye
    except wire.WireError:
        return False


def _about(address: str, error: DllamaError) -> ClusterError:
    """The error with the worker's address, once."""
    text = getattr(error, "reason", str(error))
    return error if str(error).startswith(f"worker {address}") else ClusterError(f"worker {address}: {text}")
