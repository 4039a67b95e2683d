"""The measured speed: of memory that is all read, in bytes of weights by seconds."""

import itertools

import numpy as np
import pytest

from dllama.engine import speed
from dllama.kernels import tags
from dllama.kernels.packed import ROWS, packed_bytes
from dllama.kernels.team import Team
from tests.kernels.calls import acts_of

COLUMNS = 64
GROUP_BYTES = packed_bytes(tags.Q40, ROWS, COLUMNS)


class RecordingTeam(Team):
    """Keeps what it was asked to run."""

    def __init__(self, nthreads: int):
        super().__init__(nthreads)
        self.runs: list[tuple] = []

    def run(self, function, *args) -> None:
        self.runs.append((function, *args))
        super().run(function, *args)


@pytest.fixture
def clock(monkeypatch):
    """``clock(seconds)``: each measured pass takes one of these times, in turn."""

    def set_clock(*seconds: float) -> None:
        ticks = itertools.chain.from_iterable((0.0, duration) for duration in itertools.cycle(seconds))
        monkeypatch.setattr(speed.time, "perf_counter", lambda: next(ticks))

    return set_clock


@pytest.fixture(params=[1, 2], ids=lambda n: f"{n} threads")
def team(request, monkeypatch):
    monkeypatch.setattr(speed, "NBYTES", 4 << 20)
    team = RecordingTeam(request.param)
    yield team
    team.close()


def claimed_bytes(team: RecordingTeam) -> int:
    """Bytes of weights of each pass, which are all the same."""
    ((function, _, threads, weight, _, groups, columns, group_bytes),) = {run[:8] for run in team.runs}
    assert (function, threads, weight) == (speed._read, team.nthreads, tags.Q40)
    assert group_bytes == packed_bytes(tags.Q40, ROWS, columns)
    return groups * group_bytes


def test_bytes_of_all_passes_by_their_seconds(team, clock):
    clock(0.05)
    found = speed.read_speed(team)
    nbytes = claimed_bytes(team)
    assert 0.9 * speed.NBYTES < nbytes <= speed.NBYTES
    assert len(team.runs) == 1 + 3, "one that compiles, and three until 0.12 s are over"
    assert found == pytest.approx(nbytes / 0.05)


def test_a_machine_that_is_not_steady_is_measured_for_longer(team, clock):
    clock(0.02, 0.18)
    found = speed.read_speed(team)
    assert len(team.runs) == 1 + 10, "until a second is over"
    assert found == pytest.approx(claimed_bytes(team) / 0.1)


def test_a_machine_that_is_let_run_for_turns_is_measured_over_whole_ones(team, clock):
    turn = 0.01, 0.01, 0.01, 0.08
    clock(*turn)
    found = speed.read_speed(team)
    assert len(team.runs) == 1 + 9 * len(turn) + 1, "a second ends in the middle of a turn"
    assert found == pytest.approx(claimed_bytes(team) / (sum(turn) / len(turn)))


def test_two_stops_in_a_row_are_no_turns(team, clock):
    clock(0.01, 0.08, 0.08, *[0.01] * 90)
    found = speed.read_speed(team)
    quick = len(team.runs) - 1 - 2
    assert quick > 80
    assert found == pytest.approx(claimed_bytes(team) * (quick + 2) / (0.01 * quick + 0.08 * 2))


@pytest.mark.parametrize("items", [1, 2, 5])
def test_every_byte_is_read(items):
    """A change to any byte of the item that comes last changes what is left in the end, however many there are."""
    rng = np.random.default_rng(items)
    acts = acts_of(rng.integers(1, 128, (1, COLUMNS // 32, 32), np.int8), np.ones((1, COLUMNS // 32)))
    item_bytes = speed.ITEM_GROUPS * GROUP_BYTES
    weights = np.ones(items * item_bytes, np.uint8)
    team = Team(1)

    def product() -> bytes:
        out = np.zeros(ROWS * speed.ITEM_GROUPS, np.float32)
        groups, addresses = items * speed.ITEM_GROUPS, (acts.ctypes.data, out.ctypes.data)
        team.run(speed._read, team.sync, 1, tags.Q40, weights.ctypes.data, groups, COLUMNS, GROUP_BYTES, *addresses)
        return out.tobytes()

    before = product()
    for byte in range((items - 1) * item_bytes, items * item_bytes):
        weights[byte] = 2
        assert product() != before, byte
        weights[byte] = 1
    team.close()
