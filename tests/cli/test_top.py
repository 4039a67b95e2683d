"""`--top`: the table of nodes, alone and below the text on a terminal."""

import fcntl
import os
import pty
import re
import struct
import subprocess
import termios

import pytest

from dllama import Piece
from dllama.cli.top import node_rows
from dllama.cluster.node import NodeSpec
from dllama.cluster.planner import make_plan
from dllama.engine.interface import NodeCost
from tests.cli.program import ROOT, command, dllama, succeeds
from tests.cli.screen import screen
from tests.cluster.models import LLAMA2_7B

GREEDY = ("inference", "--prompt", "Question:", "--repeat-penalty", "1.05", "--seed", "7", "--steps", "60")
SPEED = re.compile(r"\d+\.\d\d tokens/s")
HEADING = "node +share +inference +transfer +sent +received"


def pieces(*costs: tuple[NodeCost, ...]) -> list[Piece]:
    return [Piece("", 1, 50.0, nodes) for nodes in costs]


def words(rows: list[str]) -> list[list[str]]:
    return [row.split() for row in rows]


def test_a_table_of_means_with_the_slowest_marked():
    plan = make_plan(LLAMA2_7B, [NodeSpec(name) for name in ("root", "desk:1", "shelf:1")], (2, 1, 1))
    first = (
        NodeCost("root", 10, 4, 1000, 2000),
        NodeCost("desk:1", 20, 2, 500, 500),
        NodeCost("shelf:1", 9, 2, 500, 500),
    )
    second = (
        NodeCost("root", 14, 4, 1000, 2000),
        NodeCost("desk:1", 30, 4, 500, 500),
        NodeCost("shelf:1", 9, 2, 500, 500),
    )
    assert words(node_rows(pieces((), first, second), plan)) == [
        [],
        ["node", "share", "inference", "transfer", "sent", "received"],
        ["root", "50", "%", "12.0", "ms", "4.0", "ms", "1.0", "kB", "2.0", "kB"],
        ["desk:1", "25", "%", "25.0", "ms", "3.0", "ms", "0.5", "kB", "0.5", "kB", "slowest"],
        ["shelf:1", "25", "%", "9.0", "ms", "2.0", "ms", "0.5", "kB", "0.5", "kB"],
        ["20.00", "tokens/s"],
    ]


def test_workers_that_are_lost_or_left_out():
    config, speeds = LLAMA2_7B, {"root": 20e9, "desk:1": 20e9, "slow:1": 1e8}
    plan = make_plan(config, [NodeSpec(name, read_speed=speed) for name, speed in speeds.items()])
    cost = NodeCost("root", 10, 4, 1000, 2000), NodeCost("gone:1", 20, 2, 500, 500)
    rows = words(node_rows(pieces(cost), plan))
    assert [row[0] for row in rows[2:-1]] == ["root", "desk:1", "gone:1", "slow:1"]
    assert rows[3] == ["desk:1", "50", "%"]
    assert rows[4] == ["gone:1", "20.0", "ms", "2.0", "ms", "0.5", "kB", "0.5", "kB", "lost"]
    assert rows[5] == ["slow:1", "left", "out"]


def test_before_the_first_token():
    assert words(node_rows([], None))[2:] == [["the", "prompt", "is", "being", "read"]]


def test_without_a_terminal_there_is_a_table_at_the_end():
    result = dllama(*GREEDY, "--quiet", "--top", "--local-workers", "1")
    assert result.returncode == 0
    said = [line for line in result.stderr.splitlines() if " compiling the " not in line]  # at the first run
    blank, heading, root, worker, speed = said
    assert blank == "" and re.fullmatch(HEADING, heading)
    assert root.startswith("root ") and worker.startswith("127.0.0.1:")
    assert ("slowest" in root) != ("slowest" in worker)
    assert SPEED.fullmatch(speed)
    assert "\x1b" not in result.stderr + result.stdout


def on_a_terminal(*args, columns: int = 60, stdout=None) -> str:
    """What the program writes to a terminal of so many columns."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("4H", 30, columns, 0, 0))
    attributes = termios.tcgetattr(theirs)
    attributes[1] &= ~termios.OPOST  # line breaks as they are written
    termios.tcsetattr(theirs, termios.TCSANOW, attributes)
    process = subprocess.Popen(command(*args), cwd=ROOT, stdout=stdout or theirs, stderr=theirs)
    os.close(theirs)
    written = b""
    try:
        while part := os.read(ours, 65536):
            written += part
    except OSError:  # so Linux tells the end
        pass
    os.close(ours)
    assert process.wait() == 0
    return written.decode()


@pytest.fixture(scope="module")
def text():
    return succeeds(*GREEDY, "--quiet")


def test_on_a_terminal_the_text_stays_whole_above_the_table(text):
    rows = screen(on_a_terminal(*GREEDY, "--quiet", "--top"))
    blank, heading, root, speed, end = rows[-5:]
    assert blank == end == ""
    assert re.fullmatch(HEADING, heading) and root.startswith("root ") and SPEED.fullmatch(speed)
    assert all(len(row) <= 60 for row in rows)
    expected = [line[i : i + 60] for line in text.splitlines() for i in range(0, len(line), 60)]
    assert [row for row in rows[:-5] if row] == expected


def test_on_a_terminal_token_lines_go_by_above_the_table(text):
    rows = screen(on_a_terminal(*GREEDY, "--top", "--local-workers", "1", columns=100))
    tokens = [row for row in rows if row.startswith("🔶")]
    assert len(tokens) == 60
    table = [row for row in rows if re.fullmatch(HEADING, row)]
    assert len(table) == 1 and rows.index(table[0]) > rows.index(tokens[-1])
    assert rows[-3].startswith("Prompt ") and rows[-2].startswith("Generation ")


def test_text_in_a_file_and_the_table_on_the_terminal(text, tmp_path):
    with open(tmp_path / "text", "wb") as file:
        written = on_a_terminal(*GREEDY, "--quiet", "--top", stdout=file)
    assert (tmp_path / "text").read_text() == text
    rows = screen(written)
    assert rows[0] == "" and re.fullmatch(HEADING, rows[1]) and len(rows) == 5
