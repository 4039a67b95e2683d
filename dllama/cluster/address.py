"""Where a worker is: HOST:PORT as people write it, and what answers there."""

import contextlib
import socket
import time
from typing import NamedTuple

from dllama.errors import ClusterError

ANSWER_SECONDS = 1.0
"""How long `what_answers` waits."""

SIGNATURE = b"\xff" + bytes(7) + b"\x01\x7f"
"""How every peer of ZeroMQ begins (ZMTP 3, a routing id of no bytes)."""

VERSION = b"\x03"
GREETING_BYTES = 64
MECHANISM = slice(12, 32)  # of a greeting: NULL or CURVE, filled up with zeros


class Address(NamedTuple):
    """A resolved address; ``host`` is numeric."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse(text: str) -> tuple[str, int]:
    """Host and port of "10.0.0.2:9998", "shelf.local:9998" or "[fe80::1%eth0]:9998". Raises ClusterError."""
    host, colon, port = text.strip().rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    sound = host and (bracketed or ":" not in host) and host.isprintable() and " " not in host
    if not (colon and sound and port.isascii() and port.isdecimal() and 1 <= int(port[:9]) <= 65535):
        raise ClusterError(f"{text!r} is no address such as 10.0.0.2:9998 or [fe80::1%eth0]:9998")
    return (host[1:-1] if bracketed else host), int(port)


def resolve(host: str, port: int, to_bind: bool = False) -> Address:
    """An address of this name, IPv4 before IPv6; asks the system's resolver. Raises ClusterError.

    to_bind: an address of this device, "" and "*" being all of them
    """
    flags = socket.AI_PASSIVE if to_bind else 0
    host = "0.0.0.0" if to_bind and host in ("", "*") else host
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=flags)
        *_, found = min(found, key=lambda entry: entry[0] != socket.AF_INET)  # as workers listen on it by default
        numeric, _ = socket.getnameinfo(found, socket.NI_NUMERICHOST | socket.NI_NUMERICSERV)
    except (OSError, UnicodeError):  # a name too long, or not one
        raise ClusterError(f"{host}: no such host") from None
    return Address(numeric, port)


def what_answers(address: Address, secure: bool, hung_up: bool) -> str | None:
    """Why no link to this address comes about; None where that is not for good, and may be tried again.

    secure: whether our side has a key;  hung_up: whether it was the other side that ended the handshake

    It reads the greeting that every peer of ZeroMQ sends before anything is agreed: what a monitor tells is only that
    the other side hung up. Ours ends after the first bytes, so that the other side has no reason to hang up yet.
    """
    try:
        greeting = _greeting(address, time.monotonic() + ANSWER_SECONDS)
    except OSError:
        return None
    if not greeting:
        return "what listens there does not answer as a dllama worker does"
    if not greeting.startswith(SIGNATURE[:1]) or len(greeting) < GREETING_BYTES:
        return "what answers there is no dllama worker"
    theirs, ours = greeting[MECHANISM].rstrip(b"\0"), b"CURVE" if secure else b"NULL"
    if theirs == ours and not hung_up:
        return None
    if theirs == ours:
        return "it has another cluster key" if secure else "what answers there is no dllama worker"
    if theirs == b"CURVE":
        return "it asks for the cluster key, and --insecure was given here"
    if theirs == b"NULL":
        return "it runs with --insecure, and here the cluster key is asked for"
    return "what answers there is no dllama worker"


def _greeting(address: Address, end: float) -> bytes:
    """What the other side sends first, as much of it as comes in time. Raises OSError where nobody is there."""
    greeting = b""
    with socket.create_connection(address, ANSWER_SECONDS) as connection, contextlib.suppress(OSError):
        connection.sendall(SIGNATURE + VERSION)
        while len(greeting) < GREETING_BYTES:
            connection.settimeout(max(1e-3, end - time.monotonic()))
            received = connection.recv(GREETING_BYTES - len(greeting))
            if not received:
                break
            greeting += received
    return greeting
