"""Several weak devices on one Linux machine: each has an address of its own, a slow link and a part of a core.

    with Devices(4, cpu=0.2, link="1gbit") as devices:
        worker = devices[1].popen(["dllama", "worker", "--host", devices[1].address])

A device is a network namespace, joined to a switch (a bridge in a namespace of its own) by a veth pair whose two ends
are shaped by `tc tbf`, and a cgroup that the kernel stops once its processes have had their share of a period. All of
it, processes included, is removed at exit. What a killed run left is removed at the next start. The machine's own
network is not touched: the addresses, of the range for measurements (RFC 2544), exist in the namespaces only.

What it does not emulate: the latency of real cards and switches, and a memory slower than the machine's.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from dllama.errors import DllamaError

PREFIX = "dllama-bench"
NAME = re.compile(rf"{PREFIX}-(\d+)(-\w+)?$")  # the process that made it, then the device
# A bucket of what a node of four sends at once. With a smaller one the kernel waits for timers, to set which takes
# two fifths of the time of ZeroMQ's threads (a network card does that itself); a larger one delays nothing. A long
# transfer gets about three quarters of 1 Gbit/s, since the kernel's timers are late now and then.
BURST_BYTES = 16000
QUEUE_MS = 20
MOST_SHARES = 1 << 18  # the weight of a group against others, which have 1 << 10; the kernel takes no more
KILL_SECONDS = 5


class EmulationError(DllamaError):
    """This machine cannot emulate devices, or a command that sets one up failed."""


@dataclass(frozen=True)
class Device:
    """One emulated device."""

    index: int
    address: str
    namespace: str
    cgroup: Path
    cpu: float | None  # part of a core; None: no limit
    core: int | None  # which one; None: any
    processes: list[subprocess.Popen] = field(default_factory=list, repr=False)

    def popen(self, command: Sequence[str], **options) -> subprocess.Popen:
        """Start `command` on the device; options are Popen's. The process has the command's own id."""
        join = ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(self.cgroup / "cgroup.procs")]
        process = subprocess.Popen([*join, "ip", "netns", "exec", self.namespace, *map(str, command)], **options)
        self.processes.append(process)
        if self.core is not None:
            os.sched_setaffinity(process.pid, {self.core})
        return process

    def throttled_seconds(self) -> float:
        """How long the device's processes have waited for their next share of a core."""
        stat = dict(line.split() for line in (self.cgroup / "cpu.stat").read_text().splitlines())
        return int(stat["throttled_time"]) / 1e9


class Devices(Sequence[Device]):
    """`count` devices, for use in `with`.

    `cpu` is the part of one core that a device's processes get together: a number, one for each device, or None for no
    limit. `link` is the rate of every link, in each direction, as `tc` reads it; None for no limit. `period_ms` is how
    often a device gets its share: at 20 ms the kernel, which looks every few ms, still keeps to it. `core` is where all
    of them take their turns; on one core no two read memory at once, so that a device alone and eight together find the
    memory equally fast. Raises EmulationError.
    """

    def __init__(
        self,
        count: int,
        cpu: float | Sequence[float] | None = None,
        link: str | None = "1gbit",
        period_ms: float = 20,
        core: int | None = None,
    ):
        shares = list(cpu) if isinstance(cpu, Sequence) else [cpu] * count
        if len(shares) != count or not 1 <= count <= 250:
            raise EmulationError(f"{count} devices, {len(shares)} CPU shares: give 1 to 250 devices a share each")
        for share in shares:
            if share is not None and share * period_ms < 1:
                raise EmulationError(f"a share of {share} of {period_ms} ms is under 1 ms, the least the kernel gives")
        self.link, self.period_ms = link, period_ms
        self.folder = cpu_cgroup() / f"{PREFIX}-{os.getpid()}"
        self.switch = f"{self.folder.name}-switch"
        self.devices = [
            Device(i, f"198.18.0.{i + 1}", f"{self.folder.name}-{i}", self.folder / str(i), share, core)
            for i, share in enumerate(shares)
        ]

    def __len__(self) -> int:
        return len(self.devices)

    def __getitem__(self, index):
        return self.devices[index]

    def __enter__(self) -> "Devices":
        check_machine()
        remove_leftovers()
        try:
            self._add_switch()
            for device in self.devices:
                self._add_cgroup(device)
                self._add_link(device)
        except BaseException:
            self.remove()
            raise
        return self

    def __exit__(self, *exception) -> None:
        self.remove()

    def remove(self) -> None:
        """End all processes and remove the devices; Ctrl-C waits until that is done."""
        blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        processes = [process for device in self.devices for process in device.processes]
        try:
            for process in processes:  # also one that has not joined its cgroup yet
                process.kill()
            _remove(os.getpid())
            for process in processes:
                process.wait()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, blocked)

    def _add_switch(self) -> None:
        _run("ip", "netns", "add", self.switch)
        # A switch has no firewall, least of all one that runs in the devices' time.
        off = 'for each in /proc/sys/net/bridge/bridge-nf-call-*; do [ ! -e "$each" ] || echo 0 > "$each"; done'
        _run("ip", "netns", "exec", self.switch, "sh", "-c", off)
        _run("ip", "-n", self.switch, "link", "add", "bridge", "type", "bridge")
        _run("ip", "-n", self.switch, "link", "set", "bridge", "up")
        self.folder.mkdir()
        # Devices that wait for their turn behind the machine's other programs would look slower than their share.
        (self.folder / "cpu.shares").write_text(str(MOST_SHARES))

    def _add_cgroup(self, device: Device) -> None:
        device.cgroup.mkdir()
        if device.cpu is not None:
            period_us = round(self.period_ms * 1000)
            (device.cgroup / "cpu.cfs_period_us").write_text(str(period_us))
            (device.cgroup / "cpu.cfs_quota_us").write_text(str(round(period_us * device.cpu)))

    def _add_link(self, device: Device) -> None:
        here, port = device.namespace, f"port{device.index}"
        _run("ip", "netns", "add", here)
        _run("ip", "link", "add", "eth0", "netns", here, "type", "veth", "peer", "name", port, "netns", self.switch)
        _run("ip", "-n", here, "addr", "add", f"{device.address}/24", "dev", "eth0")
        _run("ip", "-n", here, "link", "set", "lo", "up")
        _run("ip", "-n", self.switch, "link", "set", port, "master", "bridge", "up")
        _run("ip", "-n", here, "link", "set", "eth0", "up")
        if self.link is not None:
            shape = ("root", "tbf", "rate", self.link, "burst", str(BURST_BYTES), "latency", f"{QUEUE_MS}ms")
            _run("tc", "-n", here, "qdisc", "add", "dev", "eth0", *shape)
            _run("tc", "-n", self.switch, "qdisc", "add", "dev", port, *shape)


def check_machine() -> None:
    """Raise EmulationError where devices cannot be emulated, naming what is missing."""
    if not hasattr(os, "geteuid") or os.geteuid() != 0:
        raise EmulationError("emulated devices need root's rights: network namespaces and cgroups")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise EmulationError(f"emulated devices need the program {tool}: install iproute2")
    if not cpu_cgroup().exists():
        raise EmulationError("emulated devices need the cpu controller of cgroup v1, and it is not mounted")


def cpu_cgroup() -> Path:
    """This process's own group of the cpu controller of cgroup v1; a device's group lies in it."""
    for line in _lines("/proc/mounts"):
        _, mount, kind, options, *_ = line.split()
        if kind == "cgroup" and "cpu" in options.split(","):
            for group in _lines("/proc/self/cgroup"):
                _, controllers, path = group.split(":", 2)
                if "cpu" in controllers.split(","):
                    inside = Path(mount + path)
                    return inside if inside.exists() else Path(mount)
    return Path("/nonexistent")


def remove_leftovers() -> None:
    """Remove the devices of runs whose process is gone."""
    for owner in {owner for owner, _ in _namespaces()} | {owner for owner, _ in _cgroups()}:
        if not Path("/proc", str(owner)).exists():
            _remove(owner)


def _remove(owner: int) -> None:
    """End the processes of the devices that process `owner` made, and remove the devices."""
    for _, folder in (each for each in _cgroups() if each[0] == owner):
        for group in (*(path for path in folder.iterdir() if path.is_dir()), folder):
            _remove_group(group)
    for _, name in (each for each in _namespaces() if each[0] == owner):
        _run("ip", "netns", "delete", name)


def _remove_group(group: Path) -> None:
    (group / "cpu.cfs_quota_us").write_text("-1")  # a stopped process dies only when it runs
    deadline = time.monotonic() + KILL_SECONDS
    while True:
        for pid in _lines(group / "cgroup.procs"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGKILL)
        try:
            return group.rmdir()
        except OSError as error:  # busy until its last process has ended
            if time.monotonic() > deadline:
                raise EmulationError(f"{group} cannot be removed: {error.strerror}") from None
        time.sleep(0.01)


def _namespaces() -> Iterator[tuple[int, str]]:
    """Network namespaces of emulated devices and switches: the process that made it, and its name."""
    folder = Path("/run/netns")
    return _owned(sorted(folder.iterdir()) if folder.exists() else [])


def _cgroups() -> Iterator[tuple[int, Path]]:
    """Folders of emulated devices' cgroups: the process that made it, and the path."""
    return ((owner, cpu_cgroup() / name) for owner, name in _owned(sorted(cpu_cgroup().iterdir())))


def _owned(paths: Sequence[Path]) -> Iterator[tuple[int, str]]:
    return ((int(found[1]), path.name) for path in paths if (found := NAME.match(path.name)))


def _lines(path: str | Path) -> list[str]:
    try:
        return Path(path).read_text().splitlines()
    except OSError:
        return []


def _run(*command: str) -> None:
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        reason = (result.stderr.strip() or f"exit code {result.returncode}").splitlines()[-1]
        raise EmulationError(f"{' '.join(command)}: {reason}")
