"""What a device's system tells, from files as real devices have them."""

import pytest

from dllama.doctor import board
from dllama.doctor.finding import State


def write(folder, files: dict):
    """The folder, with these files in it."""
    for name, text in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


@pytest.mark.parametrize(
    ("governors", "state", "value"),
    [
        (("performance\n", "performance\n"), State.OK, "performance"),
        (("ondemand\n", "performance\n"), State.SLOW, "ondemand, performance"),
        ((), State.UNKNOWN, None),
    ],
)
def test_governor(tmp_path, governors, state, value):
    files = {f"devices/system/cpu/cpu{i}/cpufreq/scaling_governor": text for i, text in enumerate(governors)}
    finding = board.governor("here", write(tmp_path, files))
    assert (finding.state, finding.value) == (state, value)
    assert bool(finding.advice) == (state is State.SLOW)


@pytest.mark.parametrize(
    ("sensors", "state", "value"),
    [
        (("48312\n",), State.OK, 48.312),
        (("20000\n", "81500\n"), State.SLOW, 81.5),
        (("-3000\n",), State.OK, -3.0),
        (("",), State.UNKNOWN, None),
        ((), State.UNKNOWN, None),
    ],
)
def test_the_hottest_sensor(tmp_path, sensors, state, value):
    files = {f"class/thermal/thermal_zone{i}/temp": text for i, text in enumerate(sensors)}
    finding = board.temperature("here", write(tmp_path, files))
    assert (finding.state, finding.value) == (state, value)


@pytest.mark.parametrize(
    ("bits", "state", "text"),
    [
        ("0\n", State.OK, "never since the last boot"),
        ("50000\n", State.SLOW, "since the last boot: under-voltage, throttled"),
        ("50005\n", State.SLOW, "now: under-voltage, throttled"),
        ("e0008\n", State.SLOW, "now: soft temperature limit"),
        (None, State.UNKNOWN, "no Raspberry Pi, which would tell"),
    ],
)
def test_the_firmwares_flags(tmp_path, bits, state, text):
    finding = board.throttling("here", write(tmp_path, {} if bits is None else {board.THROTTLED: bits}))
    assert (finding.state, finding.text) == (state, text)


@pytest.mark.parametrize(
    ("total", "free", "state", "text"),
    [
        (0, 0, State.OK, "none"),
        (102396, 102396, State.OK, "0 bytes in use"),
        (2 << 20, 1 << 20, State.SLOW, "1.07 GB in use: what a token needs may have to come from the disk"),
    ],
)
def test_swap(tmp_path, total, free, state, text):
    meminfo = f"MemTotal: 8000000 kB\nSwapTotal: {total} kB\nSwapFree: {free} kB\nHugePages_Total: 0\n"
    finding = board.swap("here", write(tmp_path, {"meminfo": meminfo}))
    assert (finding.state, finding.text) == (state, text)
    assert board.swap("here", tmp_path / "none").state is State.UNKNOWN


def test_disk(tmp_path, monkeypatch):
    finding = board.disk("here", tmp_path / "not" / "there" / "yet")
    assert finding.value > 0 and finding.text.endswith(f"free in {tmp_path}")
    monkeypatch.setattr(board, "LITTLE_DISK", finding.value * 4)
    assert board.disk("here", tmp_path).state is State.SLOW
    monkeypatch.setattr(board, "NO_DISK", finding.value * 4)
    assert board.disk("here", tmp_path).state is State.WRONG


def test_this_machine_has_a_clock():
    finding = board.clock("here")
    assert (finding.value is None) == (finding.state is State.UNKNOWN)


def test_all_of_them(tmp_path):
    checks = [finding.check for finding in board.board_findings("here", tmp_path, tmp_path, tmp_path)]
    assert checks == ["governor", "temperature", "throttling", "swap", "clock", "disk"]
