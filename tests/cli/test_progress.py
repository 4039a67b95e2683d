"""Tasks that take long: bars on a terminal, lines elsewhere."""

import io
import sys

import pytest

from dllama.cli import progress as module
from dllama.cli.live import Live, cells, crop
from dllama.cli.progress import Progress
from tests.cli.screen import screen


@pytest.fixture
def clock(monkeypatch):
    """The time that the tasks go by."""
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_a_long_task_is_told_of_now_and_then(clock):
    lines = []
    progress = Progress(Live(), lines.append)
    for second in range(31):
        clock[0] = 100 + second
        progress("receiving weights", 10_000_000 * (1 + second), 310_000_000)
    assert lines == [
        "receiving weights: 12 % of 310.0 MB, 10.0 MB/s, 27 s left",
        "receiving weights: 48 % of 310.0 MB, 10.0 MB/s, 16 s left",
        "receiving weights: 83 % of 310.0 MB, 10.0 MB/s, 5 s left",
        "receiving weights: 300.0 MB in 30.0 s, 10.0 MB/s",
    ]


def test_a_short_task_and_one_that_has_not_begun_are_not_worth_a_word(clock):
    lines = []
    progress = Progress(Live(), lines.append)
    for second in range(100):
        clock[0] = 100 + second
        progress("loading weights", 0, 1)
    progress("loading weights", 5, 10)
    clock[0] += 1
    progress("loading weights", 10, 10)
    progress("loading weights", 10, 10)
    assert lines == []


def test_what_was_there_already_is_no_part_of_the_rate(clock):
    lines = []
    progress = Progress(Live(), lines.append)
    for second in range(11):
        clock[0] = 100 + second
        progress("receiving weights", 900_000_000 + 10_000_000 * second, 1_000_000_000)
    assert lines[-1] == "receiving weights: 100.0 MB in 10.0 s, 10.0 MB/s"


def test_a_task_may_come_again(clock):
    lines = []
    progress = Progress(Live(), lines.append)
    for start in (100, 200):
        for second in (0, 5):
            clock[0] = start + second
            progress("loading weights", 10 + 40 * second, 210)
    assert lines == ["loading weights: 200 bytes in 5.0 s, 40 bytes/s"] * 2


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_on_a_terminal_with_lines_above_them(clock, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = Progress(Live(), lambda line: print(line, file=terminal))
    for second in range(6):
        clock[0] = 100 + second
        progress("loading weights", 4_000_000 * (1 + second), 64_000_000)
        progress("sending weights", 1_000_000 * (1 + second), 10_000_000)
        if second == 4:
            progress.say("worker desk:1 is left out")
    assert screen(terminal.getvalue()) == [
        "worker desk:1 is left out",
        "loading weights ██████░░░░░░░░░░ 37 % of 64.0 MB, 4.0 MB/s, 10 s left",
        "sending weights ████████░░░░░░░░ 50 % of 10.0 MB, 800 kB/s, 6 s left",
    ]
    clock[0] += module.GIVEN_UP_SECONDS
    progress("sending weights", 10_000_000, 10_000_000)
    assert screen(terminal.getvalue())[1:] == ["sending weights: 9.0 MB in 8.0 s, 1.1 MB/s", ""]
    progress.end()


def test_text_is_measured_in_columns():
    assert cells("abc") == 3
    assert cells("日本") == 4
    assert cells("e\u0301") == 1
    assert crop("日本語", 5) == "日本"
    assert crop("abc", 5) == "abc"
