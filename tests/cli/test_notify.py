"""What a worker tells systemd: here the test listens in its place."""

import os
import signal
import socket

import pytest

from dllama.cli.notify import Service
from tests.cli.workers import Worker


@pytest.fixture
def manager(tmp_path, monkeypatch):
    """A socket as systemd would hand it to a service, and its address in the environment."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(str(tmp_path / "notify"))
        listening.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        yield listening


def told(manager) -> str:
    return manager.recv(4096).decode()


def test_what_is_told(manager, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "30000000")
    service = Service()
    service.status("two\nlines, \udcff")
    service.ready()
    service.alive()
    assert [told(manager) for _ in range(3)] == ["STATUS=two lines, ?", "READY=1", "WATCHDOG=1"]
    assert service.watchdog_seconds == 30
    assert not {"NOTIFY_SOCKET", "WATCHDOG_USEC", "WATCHDOG_PID"} & os.environ.keys()  # not for what it starts


def test_an_abstract_socket(monkeypatch):
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listening:
        listening.bind(f"\0dllama-test-{os.getpid()}")
        listening.settimeout(60)
        monkeypatch.setenv("NOTIFY_SOCKET", f"@dllama-test-{os.getpid()}")
        Service().ready()
        assert told(listening) == "READY=1"


@pytest.mark.parametrize("environment", [{}, {"WATCHDOG_USEC": "5"}])
def test_no_service(monkeypatch, environment):
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    service = Service()
    service.ready()
    assert service.watchdog_seconds is None


@pytest.mark.parametrize(("microseconds", "pid"), [("", None), ("soon", None), ("5000000", "1")])
def test_no_watchdog_for_this_process(manager, monkeypatch, microseconds, pid):
    monkeypatch.setenv("WATCHDOG_USEC", microseconds)
    if pid:
        monkeypatch.setenv("WATCHDOG_PID", pid)
    assert Service().watchdog_seconds is None


def test_nobody_listens_any_more(manager, tmp_path):
    service = Service()
    manager.close()
    os.unlink(tmp_path / "notify")
    service.ready()


def test_a_worker_as_a_service(manager, tmp_path, monkeypatch):
    monkeypatch.setenv("WATCHDOG_USEC", "300000")
    with Worker(tmp_path, "--insecure") as worker:
        said = []
        while said.count("WATCHDOG=1") < 2:
            said.append(told(manager))
        assert said[0] == (
            f"STATUS=listening on {worker.address}, 1 thread, --insecure: anybody who reaches it can use this device"
        )
        assert said[1] == "READY=1"
        assert worker.end(signal.SIGTERM) == 0
