"""What a device's system tells of its CPU, heat, power, clock and disk. Nothing but files of /proc and /sys is read."""

import ctypes
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

from dllama.doctor.finding import Finding, State
from dllama.engine.memory import in_units

HOT_CELSIUS = 80.0
"""Where a Raspberry Pi begins to slow down."""
MUCH_SWAP = 64 << 20
LITTLE_DISK = 2 * 10**9
NO_DISK = 200 * 10**6

THROTTLED = "devices/platform/soc/soc:firmware/get_throttled"
"""What ``vcgencmd get_throttled`` prints, in hexadecimal: bits 0 to 3 for now, 16 to 19 since the last boot."""
FLAGS = ("under-voltage", "frequency capped", "throttled", "soft temperature limit")
NOW, EARLIER = range(4), range(16, 20)

TIME_ERROR = 5  # adjtimex(2): the clock is not synchronised
TIMEX_BYTES = 256  # more than struct timex has

POWER = "use the board's own power supply and a short cable, and cool it: a heat sink with a fan"


def board_findings(node: str, folder: Path, sys: Path = Path("/sys"), proc: Path = Path("/proc")) -> Iterator[Finding]:
    """All of them. ``folder``: where slices and compiled kernels are kept."""
    yield governor(node, sys)
    yield temperature(node, sys)
    yield throttling(node, sys)
    yield swap(node, proc)
    yield clock(node)
    yield disk(node, folder)


def governor(node: str, sys: Path) -> Finding:
    """What decides how fast the CPU is clocked."""
    files = sys.glob("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_governor")
    found = sorted({name for name in map(_read, files) if name})
    text = ", ".join(found)
    if not found:
        return Finding(node, "governor", State.UNKNOWN, "the system does not let the CPU's clock be set")
    if found == ["performance"]:
        return Finding(node, "governor", State.OK, text, value=text)
    advice = "echo performance | sudo tee /sys/devices/system/cpu/cpu*/cpufreq/scaling_governor"
    return Finding(node, "governor", State.SLOW, f"{text}: the CPU's clock lags behind the work", advice, text)


def temperature(node: str, sys: Path) -> Finding:
    """The hottest sensor."""
    told = [_read(file) for file in sys.glob("class/thermal/thermal_zone*/temp")]
    celsius = max((int(text) / 1000 for text in told if text.lstrip("-").isdecimal()), default=None)
    if celsius is None:
        return Finding(node, "temperature", State.UNKNOWN, "the system has no sensor")
    if celsius < HOT_CELSIUS:
        return Finding(node, "temperature", State.OK, f"{celsius:.0f} °C", value=celsius)
    text = f"{celsius:.0f} °C: from {HOT_CELSIUS:.0f} °C on a board slows down"
    return Finding(node, "temperature", State.SLOW, text, "cool it: a heat sink with a fan, and air around it", celsius)


def throttling(node: str, sys: Path) -> Finding:
    """What a Raspberry Pi's firmware says of its power and heat."""
    try:
        bits = int(_read(sys / THROTTLED), 16)
    except ValueError:
        return Finding(node, "throttling", State.UNKNOWN, "no Raspberry Pi, which would tell")
    now, earlier = ([FLAGS[bit % 16] for bit in kind if bits >> bit & 1] for kind in (NOW, EARLIER))
    if now:
        return Finding(node, "throttling", State.SLOW, f"now: {', '.join(now)}", POWER, hex(bits))
    if earlier:
        return Finding(node, "throttling", State.SLOW, f"since the last boot: {', '.join(earlier)}", POWER, hex(bits))
    return Finding(node, "throttling", State.OK, "never since the last boot", value=hex(bits))


def swap(node: str, proc: Path) -> Finding:
    """Memory that was moved to the disk."""
    fields = dict(line.split(":", 1) for line in _read(proc / "meminfo").splitlines() if ":" in line)
    if not {"SwapTotal", "SwapFree"} <= fields.keys():
        return Finding(node, "swap", State.UNKNOWN, "the system does not tell")
    total, free = (1024 * int(fields[name].split()[0]) for name in ("SwapTotal", "SwapFree"))
    if total - free < MUCH_SWAP:
        text = f"{in_units(total - free)} in use" if total else "none"
        return Finding(node, "swap", State.OK, text, value=total - free)
    text = f"{in_units(total - free)} in use: what a token needs may have to come from the disk"
    advice = "end what else runs there, or take it off: sudo swapoff -a && sudo swapon -a"
    return Finding(node, "swap", State.SLOW, text, advice, total - free)


def clock(node: str) -> Finding:
    """Whether it is set by a time server; the value is its time, in seconds since 1970."""
    try:
        state = ctypes.CDLL(None).adjtimex(ctypes.create_string_buffer(TIMEX_BYTES))
    except (OSError, AttributeError):
        state = -1
    if state == -1:
        return Finding(node, "clock", State.UNKNOWN, "the system does not tell whether it is synchronised")
    if state != TIME_ERROR:
        return Finding(node, "clock", State.OK, "synchronised", value=time.time())
    text = "not synchronised: the nodes' logs cannot be compared"
    return Finding(node, "clock", State.SLOW, text, "sudo timedatectl set-ntp true", time.time())


def disk(node: str, folder: Path) -> Finding:
    """Room for slices and compiled kernels."""
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    text = f"{in_units(free)} free in {folder}"
    if free >= LITTLE_DISK:
        return Finding(node, "disk", State.OK, text, value=free)
    program = "dllama-node" if shutil.which("dllama-node") else "dllama"  # where Ansible has set it up
    advice = f"{program} cache clear frees what slices take; sudo apt-get clean, what packages take"
    return Finding(node, "disk", State.WRONG if free < NO_DISK else State.SLOW, text, advice, free)


def _read(path: Path) -> str:
    """What a file says; nothing where there is none."""
    try:
        return path.read_text().strip("\0\n ")
    except OSError:
        return ""
