"""Who may connect to a listener: only nodes that hold the cluster's key.

ZeroMQ asks one handler in each context about every encrypted connection (ZAP, rfc.zeromq.org/spec/27). CurveZMQ itself
only makes sure that a client knows the server's public key, and has the secret half of the one it shows.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import zmq

from dllama.cluster.key import ClusterKey

if TYPE_CHECKING:
    from zmq.auth.thread import ThreadAuthenticator

ZAP_DOMAIN = b"dllama"


def admit_only(key: ClusterKey, context: zmq.Context) -> ThreadAuthenticator:
    """Let clients with this key through to the sockets of a context whose ZAP_DOMAIN is the one above, nobody else.

    A thread answers until it is stopped.
    """
    from zmq.auth.thread import ThreadAuthenticator  # takes long to import, and not all nodes have a key

    authenticator = ThreadAuthenticator(context)
    authenticator.configure_curve_callback(ZAP_DOMAIN.decode(), _OnlyThis(key))
    authenticator.start()
    return authenticator


class _OnlyThis:
    def __init__(self, key: ClusterKey):
        self._key = key

    def callback(self, domain: str, public: bytes) -> bool:
        """Whether a client with this public key may connect; asked from the authenticator's thread."""
        return public == self._key.public
