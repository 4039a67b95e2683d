import contextlib
import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.cluster.address import Address, parse, resolve, what_answers
from dllama.errors import ClusterError


@pytest.mark.parametrize(
    "text, expected",
    [
        ("10.0.0.2:9998", ("10.0.0.2", 9998)),
        (" shelf.local:1 ", ("shelf.local", 1)),
        ("[::1]:65535", ("::1", 65535)),
        ("[fe80::1%eth0]:9998", ("fe80::1%eth0", 9998)),
    ],
)
def test_addresses(text, expected):
    assert parse(text) == expected


@pytest.mark.parametrize(
    "text",
    ["", "shelf", "shelf:", ":9998", "shelf:x", "shelf:0", "shelf:65536", "shelf:-1", "shelf:٣", "shelf:1e3"]
    + ["::1:9998", "a b:1", "[::1]", "a\n:1", "tcp://shelf:9998", "shelf:9998/", "shelf:" + "9" * 5000],
)
def test_what_is_no_address_is_named(text):
    with pytest.raises(ClusterError, match="is no address such as 10.0.0.2:9998"):
        parse(text)


@given(st.text(max_size=30))
def test_any_text_is_an_address_or_refused(text):
    try:
        host, port = parse(text)
    except ClusterError:
        return
    assert host and 1 <= port <= 65535


def test_names_are_resolved_to_numbers():
    assert resolve("127.0.0.1", 7) == ("127.0.0.1", 7)
    assert str(resolve("::1", 7)) == "[::1]:7"
    assert resolve("localhost", 7).host in ("127.0.0.1", "::1")
    assert resolve("", 7, to_bind=True) == resolve("*", 7, to_bind=True) == ("0.0.0.0", 7)


@pytest.mark.parametrize("host", ["nonesuch.invalid", "a" * 300, "10.0.0.2.3.4.5"])
def test_unknown_hosts(host):
    with pytest.raises(ClusterError, match=f"{host}: no such host"):
        resolve(host, 7)


def greeting(mechanism: bytes) -> bytes:
    return b"\xff" + bytes(8) + b"\x7f\x03\x01" + mechanism.ljust(20, b"\0") + bytes(32)


@pytest.mark.parametrize(
    "said, secure, hung_up, expected",
    [
        (b"", True, True, "does not answer as a dllama worker does"),
        (b"HTTP/1.1 400 Bad Request\r\n" * 9, True, True, "no dllama worker"),
        (b"SSH-2.0", False, True, "no dllama worker"),
        (greeting(b"NULL")[:40], False, True, "no dllama worker"),
        (greeting(b"PLAIN"), True, True, "no dllama worker"),
        (greeting(b"\xff"), True, True, "no dllama worker"),
        (greeting(b"NULL"), False, True, "no dllama worker"),
        (greeting(b"NULL"), True, True, "it runs with --insecure"),
        (greeting(b"CURVE"), False, True, "it asks for the cluster key"),
        (greeting(b"CURVE"), True, True, "another cluster key"),
        (greeting(b"CURVE"), True, False, None),
        (greeting(b"NULL"), False, False, None),
    ],
)
def test_what_answers_is_told_by_its_greeting(said, secure, hung_up, expected):
    def answer():
        connection, _ = server.accept()
        with connection, contextlib.suppress(OSError):
            connection.sendall(said)
            connection.shutdown(socket.SHUT_WR)
            connection.recv(100)

    with socket.create_server(("127.0.0.1", 0)) as server:
        thread = threading.Thread(target=answer)
        thread.start()
        reason = what_answers(Address("127.0.0.1", server.getsockname()[1]), secure, hung_up)
        thread.join()
    assert reason is None if expected is None else expected in reason


def test_nothing_is_known_of_what_cannot_be_reached():
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = Address("127.0.0.1", server.getsockname()[1])
    assert what_answers(address, True, True) is None
