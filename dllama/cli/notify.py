"""What a service tells systemd: that it is ready, what it is at, and that it is still alive (sd_notify(3))."""

from __future__ import annotations

import os
import socket
from contextlib import suppress


class Service:
    """This process as a service. Where it is none, nobody is told anything.

    ``watchdog_seconds``: systemd ends a service that it has not heard `alive` from for so long; None: it does not ask
    """

    def __init__(self):
        address = os.environ.pop("NOTIFY_SOCKET", None)  # for this process, not for those that it starts
        self._socket = address and socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
        self._address = address and (b"\0" + address[1:].encode() if address.startswith("@") else address)
        for_this = os.environ.pop("WATCHDOG_PID", str(os.getpid())) == str(os.getpid())
        microseconds = os.environ.pop("WATCHDOG_USEC", "")
        asked = address and for_this and microseconds.isdecimal()
        self.watchdog_seconds = int(microseconds) / 1e6 if asked else None

    def ready(self) -> None:
        """It does what it is for from now on."""
        self._tell("READY=1")

    def status(self, line: str) -> None:
        """What it is at, for people: ``systemctl status`` shows it."""
        self._tell(f"STATUS={' '.join(line.split())}")

    def alive(self) -> None:
        """It gets on with its work."""
        self._tell("WATCHDOG=1")

    def _tell(self, text: str) -> None:
        if self._socket:
            with suppress(OSError):  # it works as well unheard
                self._socket.sendto(text.encode(errors="replace"), self._address)
