"""How fast nodes are beside each other: all of them measure at the same time.

Shares need to know only that, and what nodes measure one after the other says little about it: two workers on one
machine have its memory to themselves then, and a virtual machine's memory is now twice as fast as it is a minute later.
"""

import time
from collections.abc import Sequence
from statistics import harmonic_mean

from dllama.cluster import wire
from dllama.cluster.links import Link, LinkLost
from dllama.cluster.supply import SILENCE_SECONDS
from dllama.engine.speed import read_speed
from dllama.kernels.team import Team

ROUNDS = 3


def speeds_together(team: Team, links: Sequence[Link], epoch: int) -> list[float]:
    """Bytes of weights a second, of this machine and of the worker at each link, for the plan of this epoch.

    Raises LinkLost, also for a worker that does not measure.
    """
    rounds = []
    for number in range(ROUNDS):
        for link in links:
            link.send(wire.encode(wire.Measure(epoch, number)))
        own = read_speed(team)
        rounds.append([own, *(_answer(link, epoch, number) for link in links)])
    return [harmonic_mean(each) for each in zip(*rounds, strict=True)]


def _answer(link: Link, epoch: int, number: int) -> float:
    """What a worker measures in a round; one whose threads are busy says so twice a second until they are not."""
    heard = time.monotonic()
    while (left := heard + SILENCE_SECONDS - time.monotonic()) > 0:
        frames = link.receive(1e3 * left)
        if frames is None:
            break
        heard = time.monotonic()
        try:
            message, _ = wire.decode(frames)
        except wire.WireError as error:
            raise LinkLost(link, f"it sends what is no message: {error}") from None
        if type(message) is wire.Refuse:
            raise LinkLost(link, message.reason)
        if type(message) is wire.Bye:
            raise LinkLost(link, "it has left")
        if type(message) is wire.Measured and message[:2] == (epoch, number):
            return message.read_speed
    raise LinkLost(link, f"it has not been heard of for {SILENCE_SECONDS:g} s")
