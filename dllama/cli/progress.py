"""How far tasks that take long are: bars on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable
from dataclasses import dataclass

from dllama.cli.live import Live
from dllama.engine.memory import in_units

AFTER_SECONDS = 2.0
"""Tasks that are done sooner are not worth a word."""

REDRAW_SECONDS = 0.2
LINE_SECONDS = 10.0
"""Between lines about a task where there is no terminal."""

GIVEN_UP_SECONDS = 3.0
"""A task that was not heard of for so long has no bar: it may never end."""

CELLS = 16


@dataclass
class _Task:
    started: float  # time.monotonic()
    first: int  # bytes that were there already
    done: int
    total: int
    due: float  # when to tell of it next
    heard: float = 0.0

    def figures(self, now: float) -> str:
        rate = (self.done - self.first) / max(1e-3, now - self.started)
        left = f", {(self.total - self.done) / rate:.0f} s left" if rate else ""
        return f"{100 * self.done // max(1, self.total)} % of {in_units(self.total)}, {in_units(int(rate))}/s{left}"

    def bar(self) -> str:
        filled = CELLS * self.done // max(1, self.total)
        return "█" * filled + "░" * (CELLS - filled)

    def summary(self, now: float) -> str:
        seconds, moved = now - self.started, self.done - self.first
        return f"{in_units(moved)} in {seconds:.1f} s, {in_units(int(moved / seconds))}/s"


class Progress:
    """Call it with a task's name, the bytes done and in all, from any thread and as often as you like.

    log: prints a line; the bars are in the way of it on a terminal, so all lines have to go through `say`
    """

    def __init__(self, live: Live, log: Callable[[str], None]):
        self._live, self._log = live, log
        self._tasks: dict[str, _Task] = {}
        self._drawn = 0.0

    def __call__(self, name: str, done: int, total: int) -> None:
        if not done:  # it waits for something, or compiles
            return
        with self._live.lock:
            now = time.monotonic()
            task = self._tasks.get(name)
            if task is None or done < task.done:
                task = self._tasks[name] = _Task(now, done, done, total, now + AFTER_SECONDS)
            task.done, task.total, task.heard = done, total, now
            if done >= total:
                del self._tasks[name]
                if now - task.started > AFTER_SECONDS:
                    self.say(f"{name}: {task.summary(now)}")
            elif self._live.terminal:
                self._draw(now)
            elif now > task.due:
                task.due = now + LINE_SECONDS
                self._log(f"{name}: {task.figures(now)}")

    def say(self, line: str) -> None:
        """Print a line above the bars."""
        with self._live.lock:
            self._live.erase()
            self._log(line)

    def end(self) -> None:
        """Forget the tasks: nothing more will be heard of them."""
        with self._live.lock:
            self._tasks.clear()
            self._live.erase()

    def _draw(self, now: float) -> None:
        alive = {name: task for name, task in self._tasks.items() if now - task.heard < GIVEN_UP_SECONDS}
        long = {name: task for name, task in alive.items() if now - task.started > AFTER_SECONDS}
        if long and now - self._drawn > REDRAW_SECONDS:
            self._drawn = now
            width = max(map(len, long))
            self._live.draw([f"{name:{width}} {task.bar()} {task.figures(now)}" for name, task in long.items()])
