"""Emulated devices: what they are made of, that they reach each other, and that nothing is left of them."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench import emulate
from bench.emulate import Device, Devices, EmulationError
from bench.runs import REPOSITORY


def _unavailable() -> str:
    try:
        emulate.check_machine()
        with Devices(1):
            return ""
    except EmulationError as error:
        return str(error)


UNAVAILABLE = _unavailable()
emulates = pytest.mark.skipif(bool(UNAVAILABLE), reason=UNAVAILABLE)

LISTEN = "import socket; s = socket.create_server(('0.0.0.0', 7000)); print('up', flush=True); c, _ = s.accept()"
LISTEN += "; print(c.getpeername()[0], c.recv(9).decode())"
CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], 7000)).send(b'hello')"


def traces(owner: int) -> list[str]:
    """Namespaces and cgroups of the devices that process `owner` made."""
    folders = [folder for folder in (Path("/run/netns"), emulate.cpu_cgroup()) if folder.exists()]
    return [path.name for folder in folders for path in folder.iterdir() if f"{emulate.PREFIX}-{owner}" in path.name]


def output(device: Device, *command: str) -> str:
    with device.popen(command, stdout=subprocess.PIPE, text=True) as process:
        return process.stdout.read()


@emulates
def test_devices_reach_each_other_under_their_own_addresses():
    with Devices(3) as devices:
        with devices[1].popen([sys.executable, "-c", LISTEN], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "up\n"
            assert devices[2].popen([sys.executable, "-c", CONNECT, devices[1].address]).wait() == 0
            assert process.stdout.read() == f"{devices[2].address} hello\n"


@emulates
def test_links_are_shaped_in_both_directions_and_cores_by_a_quota():
    with Devices(2, cpu=[0.6, 0.2], link="100mbit", period_ms=10) as devices:
        assert "tbf" in output(devices[0], "tc", "qdisc", "show", "dev", "eth0")
        ports = subprocess.run(["tc", "-n", devices.switch, "qdisc"], capture_output=True, text=True).stdout
        assert ports.count("rate 100Mbit") == 2
        quotas = [int((device.cgroup / "cpu.cfs_quota_us").read_text()) for device in devices]
        assert quotas == [6000, 2000]
        assert {(device.cgroup / "cpu.cfs_period_us").read_text() for device in devices} == {"10000\n"}
        assert str(devices[1].cgroup.relative_to(emulate.cpu_cgroup())) in output(
            devices[1], "cat", "/proc/self/cgroup"
        )


@emulates
def test_a_device_that_works_all_the_time_is_stopped_again_and_again():
    with Devices(1, cpu=0.1) as devices:
        spin = "import time\nwhile time.process_time() < 0.1: pass"
        assert devices[0].popen([sys.executable, "-c", spin]).wait() == 0
        assert devices[0].throttled_seconds() > 0


@emulates
def test_devices_take_turns_on_one_core():
    core = max(os.sched_getaffinity(0))
    with Devices(1, core=core) as devices:
        assert f"Cpus_allowed_list:\t{core}\n" in output(devices[0], "sh", "-c", "sleep 0.1; cat /proc/self/status")


@emulates
@pytest.mark.parametrize("error", [None, RuntimeError, KeyboardInterrupt])
def test_nothing_is_left(error):
    try:
        with Devices(2, cpu=0.5) as devices:
            process = devices[0].popen(["sh", "-c", "sleep 60 & exec sleep 60"])
            assert traces(os.getpid())
            if error:
                raise error
    except (RuntimeError, KeyboardInterrupt):
        pass
    assert process.poll() == -signal.SIGKILL
    assert not traces(os.getpid())


@emulates
def test_a_setup_that_fails_leaves_nothing():
    with pytest.raises(EmulationError, match="tc .*rate"):
        Devices(2, link="fast").__enter__()
    assert not traces(os.getpid())


@emulates
def test_what_a_killed_run_left_is_removed_at_the_next_start():
    code = "import os; from bench.emulate import Devices; d = Devices(1).__enter__()"
    code += "; print(os.getpid(), d[0].popen(['sleep', '60'], stdout=-3).pid, flush=True); os._exit(1)"
    result = subprocess.run([sys.executable, "-c", code], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    owner, child = map(int, result.stdout.split())
    assert traces(owner) and Path("/proc", str(child)).exists()
    with Devices(1):
        assert not traces(owner)
    state = Path("/proc", str(child), "stat")
    assert not state.exists() or ") Z " in state.read_text()  # where nobody reaps orphans


@pytest.mark.parametrize(
    ("count", "cpu", "message"),
    [
        (0, None, "0 devices"),
        (251, None, "251 devices"),
        (3, [0.5, 0.5], "3 devices, 2 CPU shares"),
        (2, [0.5, 0.01], "a share of 0.01 of 20 ms is under 1 ms"),
    ],
)
def test_devices_that_make_no_sense_are_refused(count, cpu, message):
    with pytest.raises(EmulationError, match=message):
        Devices(count, cpu)


def test_ordinary_users_are_told_what_is_missing(monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(EmulationError, match="root"):
        Devices(1).__enter__()


def test_missing_programs_are_named(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EmulationError, match="the program ip: install iproute2"):
        Devices(1).__enter__()
