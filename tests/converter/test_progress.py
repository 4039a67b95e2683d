import click
import pytest

from converter import progress


@pytest.fixture
def clock(monkeypatch):
    """The monotonic clock, turned by hand."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_line_for_every_tenth_with_the_time_left(clock, capsys):
    with progress.progress("Writing", 100) as report:
        for _ in range(100):
            clock[0] += 2
            report(1)
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 10
    assert lines[0] == "Writing: 10 %, 20 s, about 180 s left"
    assert lines[-1] == "Writing: 100 %, 200 s, about 0 s left"


def test_quick_work_gives_one_line(clock, capsys):
    with progress.progress("Writing", 100) as report:
        for _ in range(100):
            clock[0] += 0.001
            report(1)
    assert capsys.readouterr().err == "Writing: 100 %, 0 s, about 0 s left\n"


def test_a_terminal_gets_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(progress.sys.stderr, "isatty", lambda: True, raising=False)
    with progress.progress("Writing", 4) as report:
        for _ in range(4):
            report(1)
    assert "100%" in click.unstyle(capsys.readouterr().err)
