"""Tickets, barriers, and a team that outlives what goes wrong in a step."""

import signal
import threading
import time

import numpy as np
import pytest

from dllama.kernels.jit import jit
from dllama.kernels.team import Team, meet, sigint_held, take


@pytest.fixture(params=[1, 2, 3, 4], ids=lambda n: f"{n} threads")
def team(request):
    team = Team(request.param)
    yield team
    team.close()


@pytest.fixture(params=[2, 4], ids=lambda n: f"{n} threads")
def several(request):
    """A team with helpers."""
    team = Team(request.param)
    yield team
    team.close()


@jit
def _count(thread, sync, threads, stages, items, counts):
    """Each stage hands out its items once: counts[stage, item] += 1."""
    base = 0
    for stage in range(stages):
        item = take(sync, base)
        while item < items:
            counts[stage, item] += 1
            item = take(sync, base)
        meet(sync, threads)
        base += items + threads


@jit
def _relay(thread, sync, threads, rounds, slots, errors):
    """Every round each thread writes its slot and, past a barrier, finds what all the others wrote."""
    for i in range(rounds):
        slots[thread] = i
        meet(sync, threads)
        for other in range(threads):
            if slots[other] != i:
                errors[thread] += 1
        meet(sync, threads)


@pytest.mark.parametrize("items", [0, 1, 2, 5, 1000])
def test_every_item_is_handed_out_once(team, items):
    for _ in range(20):
        counts = np.zeros((3, items), np.int64)
        team.run(_count, team.sync, team.nthreads, 3, items, counts)
        assert (counts == 1).all()


def test_nobody_passes_a_barrier_before_all_have_come(team):
    slots, errors = np.zeros(team.nthreads, np.int64), np.zeros(team.nthreads, np.int64)
    team.run(_relay, team.sync, team.nthreads, 300, slots, errors)
    assert not errors.any()
    assert (slots == 299).all()


def test_every_thread_takes_part_with_a_number_of_its_own(team):
    seen = []
    team.run(lambda thread, word: seen.append((thread, word, threading.get_ident())), "hello")
    assert sorted(number for number, _, _ in seen) == list(range(team.nthreads))
    assert len({ident for _, _, ident in seen}) == team.nthreads
    assert (0, "hello", threading.get_ident()) in seen


def works(team) -> bool:
    """Whether steps still begin and end together."""
    for _ in range(5):
        counts = np.zeros((2, 50), np.int64)
        team.run(_count, team.sync, team.nthreads, 2, 50, counts)
        if not (counts == 1).all():
            return False
    return True


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_an_error_in_the_callers_thread_is_raised_when_all_are_done(team, error):
    finished = []

    def step(thread):
        if thread == 0:
            raise error("stop")
        time.sleep(0.05)
        finished.append(thread)

    with pytest.raises(error, match="stop"):
        team.run(step)
    assert len(finished) == team.nthreads - 1
    assert works(team)


def test_ctrl_c_while_the_helpers_still_work(several):
    """The signal comes when the caller has finished its part and waits."""
    finished = []

    def step(thread):
        if thread == 1:
            time.sleep(0.05)
            signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
        if thread:
            time.sleep(0.05)
            finished.append(thread)

    with pytest.raises(KeyboardInterrupt):
        several.run(step)
    assert len(finished) == several.nthreads - 1
    assert works(several)


def test_ctrl_c_at_any_moment_is_raised_when_all_are_done(several):
    for _ in range(200):
        finished = []

        def step(thread, finished=finished):
            if thread == 1:  # while others are still being started
                signal.pthread_kill(threading.main_thread().ident, signal.SIGINT)
            finished.append(thread)

        with pytest.raises(KeyboardInterrupt):
            several.run(step)
        assert sorted(finished) == list(range(several.nthreads))
    assert works(several)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_ctrl_c_is_not_lost_where_something_else_goes_wrong():
    with pytest.raises(KeyboardInterrupt) as caught, sigint_held():
        signal.raise_signal(signal.SIGINT)
        raise ValueError("stop")
    assert isinstance(caught.value.__context__, ValueError)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_an_error_in_a_helper_reaches_the_caller(several):
    def step(thread):
        if thread == 1:
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        several.run(step)
    assert works(several)


def test_closing_ends_the_threads():
    before = threading.active_count()
    team = Team(4)
    assert threading.active_count() == before + 3
    team.close()
    assert threading.active_count() == before
    team.close()
    with pytest.raises(RuntimeError, match="closed"):
        team.run(lambda thread: None)
