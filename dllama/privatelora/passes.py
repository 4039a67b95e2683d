"""How the cloud takes passages on: those of several edges together, those of a long step one after the other; and in a
thread of its own what takes long."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Empty, SimpleQueue

import numpy as np

from dllama.engine.workspace import MAX_ROWS
from dllama.privatelora.backends import Backend
from dllama.privatelora.passage import Passage, Stop

Send = Callable[[Sequence[np.ndarray]], None]
"""As of `Backend.run`; of a long step it is called once, with the values of all its passages in one array."""


def take_on(
    backend: Backend, passages: Sequence[Passage], came_from: Stop | int, to: Stop | int, send: Send
) -> list[np.ndarray] | None:
    """Takes passages to a stop, or to the end in front of a layer: then what `Backend.finish` returns, else None.

    They are one each of several sessions, or, where they have more than MAX_ROWS rows, all of one.
    """
    if sum(len(passage.places) for passage in passages) > MAX_ROWS:
        return _one_by_one(backend, passages, came_from, to, send)
    if isinstance(to, int):
        return backend.finish(passages, came_from, to)
    return backend.run(passages, came_from, to, send)


def _one_by_one(
    backend: Backend, passages: Sequence[Passage], came_from: Stop | int, to: Stop | int, send: Send
) -> list[np.ndarray] | None:
    if isinstance(to, int):
        return [np.concatenate([backend.finish([passage], came_from, to)[0].copy() for passage in passages])]
    *others, last = passages
    lows: list[np.ndarray] = []
    for passage in others:
        backend.run([passage], came_from, to, lambda low: lows.append(low[0].copy()))
    backend.run([last], came_from, to, lambda low: send([np.concatenate([*lows, low[0]])]))
    return None


def aside(
    worker: ThreadPoolExecutor,
    work: Callable[[Send], list[np.ndarray] | None],
    send: Send,
    meanwhile: Callable[[], None],
    seconds: float,
) -> list[np.ndarray] | None:
    """Has a pass worked in another thread, which sends by way of this one; ``meanwhile`` is called here, every so many
    seconds. What the pass raises is raised."""
    said: SimpleQueue[list | None] = SimpleQueue()
    done = worker.submit(work, lambda lows: said.put([low.copy() for low in lows]))
    done.add_done_callback(lambda _: said.put(None))
    while True:
        try:
            lows = said.get(timeout=seconds)
        except Empty:
            meanwhile()
            continue
        if lows is None:
            return done.result()
        send(lows)
