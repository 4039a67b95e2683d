"""The cloud's layers over this machine and workers, each with a slice of all of them (tensor parallelism)."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from weakref import WeakKeyDictionary, WeakSet

import numpy as np

from dllama.cluster import wire
from dllama.cluster.crew import Crew
from dllama.cluster.mesh import NodeLost
from dllama.cluster.settings import ClusterSettings
from dllama.cluster.stack import StackMember
from dllama.cluster.supply import SILENCE_SECONDS
from dllama.engine.adapters import NO_ADAPTER
from dllama.errors import ClusterError, DllamaError
from dllama.formats import FloatType, ModelFile
from dllama.kernels import jit
from dllama.kernels.team import Team
from dllama.privatelora.adapter import CloudAdapter
from dllama.privatelora.backends import Restarted
from dllama.privatelora.passage import Passage, Stop

MOST_STEPS = 1 << 32
"""Steps are told from each other by numbers below this one."""
LOOK_SECONDS = 0.05
"""How often it looks whether the workers have made an adapter."""


class StackSequence:
    """A sequence, known to the nodes by its number, with room for ``capacity`` positions."""

    def __init__(self, number: int, capacity: int):
        self.number, self.capacity = number, capacity


class ClusterBackend:
    """See `Backend`. The nodes know sequences, passages and adapters by numbers that are never used again.

    Raises as `ClusterEngine`. A worker that is lost ends what is on its way: `Restarted`, until ``prepare`` has made
    the rest ready.
    """

    has_short_ways = False

    def __init__(
        self,
        model: ModelFile,
        team: Team,
        buffer_type: FloatType,
        kv_type: FloatType,
        settings: ClusterSettings,
        notify: Callable[[str], None],
        progress: Callable[[str, int, int], None],
    ):
        self.config, self._kv_type = model.config, kv_type
        self._lock = threading.RLock()  # adapters come and go in another thread, and links are for one at a time
        self._sequences: WeakSet[StackSequence] = WeakSet()
        self._passages: WeakKeyDictionary[Passage, int] = WeakKeyDictionary()
        self._adapters: set[int] = set()
        self._awaited: dict[int, dict[int, str | None]] = {}  # of adapters being made, what each worker has answered
        self._step = self._numbers = 0
        self._known: tuple[set[int], set[int]] = set(), set()  # sequences and passages that the nodes have
        self._loss: tuple[int, str] | None = None  # the worker, and why
        self._crew = Crew(model, team, 1, buffer_type, kv_type, settings, (), True, notify, progress)
        self._member: StackMember | None = StackMember(*self._crew.begin(self._hear))  # None: not ready

    @property
    def device(self) -> str:
        nodes = len(self._crew.plan.nodes)
        return f"cpu, {nodes} {'node' if nodes == 1 else 'nodes'}, {jit.ISA.name} kernels here"

    def prepare(self) -> None:
        with self._lock:
            if self._loss is not None:
                loss, self._loss = self._loss, None
                self._crew.leave_out(*loss, "by the cloud")
            elif not self._sequences and not self._adapters:
                if self._crew.take_back(self._member and self._member.mesh):
                    self._drop()
            while self._member is None:
                try:
                    self._member = StackMember(*self._crew.start(self._hear))
                except NodeLost as lost:
                    loss = lost.node, lost.reason
                else:
                    break
                self._crew.leave_out(*loss, "while it gets ready")

    # --- sequences ---

    def sequence(self, context: int) -> StackSequence:
        self._numbers += 1
        sequence = StackSequence(self._numbers, context)
        self._sequences.add(sequence)
        return sequence

    def free_bytes(self) -> int | None:
        """Of this node, for as many positions as the node with the least memory has room for."""
        taken, shares = sum(sequence.capacity for sequence in self._sequences), self._crew.plan.shares
        room = [
            (share.node.memory - share.memory_bytes(taken, self._kv_type)) // share.kv_bytes_per_position(self._kv_type)
            for share in shares
            if share.node.memory is not None
        ]
        return self.sequence_bytes(min(room)) if room else None

    def sequence_bytes(self, context: int) -> int:
        return context * self._crew.plan.shares[0].kv_bytes_per_position(self._kv_type)

    # --- adapters ---

    def add(self, adapter: CloudAdapter, layers: range) -> int:
        if adapter.seed is None:
            raise ClusterError(
                "a cloud over several nodes makes A and B out of a seed, and this adapter has none: "
                "start the cloud without --workers"
            )
        with self._lock:
            member = self._member
            if member is None:
                raise self._restarted()
            self._numbers += 1
            number, others = self._numbers, list(member.mesh.endpoints)
            self._awaited[number] = {}
            shape = adapter.shape
            seeded = {
                "r_c2d": shape.r_c2d,
                "r_d2c": shape.r_d2c,
                "targets": shape.targets,
                "layers": shape.layers,
                "seed": adapter.seed,
                "worked": (layers.start, layers.stop),
            }
            self._adapters.add(number)
            self._post(wire.Adapt(self._crew.epoch, number, seeded))
        try:
            member.load(number, adapter, layers)
            problem = None
        except (LookupError, DllamaError, MemoryError) as error:
            problem = error
        answers = self._answers(member, number, others)
        for node, words in answers.items():
            if words is not None and problem is None:
                problem = ClusterError(f"worker {self._crew.plan.nodes[node].name}: {words}")
        if problem is not None:
            self.remove(number)
            raise problem
        return number

    def remove(self, number: int) -> None:
        with self._lock:
            if number in self._adapters and self._member is not None:
                self._adapters.discard(number)
                self._member.remove(number)
                self._post(wire.Adapt(self._crew.epoch, number, None))

    def _answers(self, member: StackMember, number: int, others: Sequence[int]) -> dict[int, str | None]:
        """Of each worker why it cannot make an adapter, None for one that has. Raises Restarted."""
        since = time.monotonic()
        while True:
            with self._lock:
                if self._member is not member:
                    raise self._restarted()
                try:
                    member.mesh.look()
                    answers = self._awaited[number]
                    for node in others:
                        if node not in answers and time.monotonic() > member.mesh.heard(node, since) + SILENCE_SECONDS:
                            raise NodeLost(node, f"it has not been heard of for {SILENCE_SECONDS:g} s")
                except NodeLost as lost:
                    raise self._lose(lost) from None
                if len(answers) == len(others):
                    return self._awaited.pop(number)
            time.sleep(LOOK_SECONDS)

    def _hear(self, node: int, message) -> None:
        """What a worker says that is no part of a pass."""
        if type(message) is wire.Adapted and message.number in self._awaited:
            self._awaited[message.number][node] = message.problem

    # --- passes ---

    def run(
        self,
        passages: Sequence[Passage],
        came_from: Stop | int,
        to: Stop,
        send: Callable[[Sequence[np.ndarray]], None],
    ) -> None:
        self._pass(passages, came_from, to, send)

    def finish(self, passages: Sequence[Passage], came_from: Stop | int, layer: int) -> list[np.ndarray]:
        return self._pass(passages, came_from, layer, lambda lows: None)

    def _pass(self, passages: Sequence[Passage], came_from: Stop | int, to: Stop | int, send: Callable):
        with self._lock:
            member, enters = self._member, isinstance(came_from, int)
            if member is None or not all(self._has(passage, enters) for passage in passages):
                raise self._restarted()
            try:
                message, payload = self._message(passages, came_from, to)
                member.mesh.post(list(member.mesh.endpoints), wire.encode(message, payload))
                return member.run(message, payload, send)
            except NodeLost as lost:
                raise self._lose(lost) from None
            except BaseException as error:  # the nodes are not where they should be
                self._drop()
                raise Restarted(f"a pass has failed: {error or type(error).__name__}") from error

    def _has(self, passage: Passage, enters: bool) -> bool:
        """Whether the nodes have what it needs: nothing of it is from before they were made ready anew."""
        sequences = {place.sequence for place in passage.places}
        known = passage.adapter == NO_ADAPTER or passage.adapter in self._adapters
        return known and (enters or passage in self._passages) and sequences <= self._sequences

    def _message(self, passages: Sequence[Passage], came_from: Stop | int, to: Stop | int) -> tuple[wire.Pass, bytes]:
        self._step = (self._step + 2) % MOST_STEPS
        rows, parts = [], []
        for passage in passages:
            if isinstance(came_from, int):
                self._numbers += 1
                self._passages[passage] = self._numbers
                rows += _runs(passage)
            parts.append(passage.x if passage.answer is None else passage.answer)
            passage.x = passage.answer = None
        live = {sequence.number for sequence in self._sequences}, set(self._passages.values())
        freed, ended = (tuple(known - now) for known, now in zip(self._known, live, strict=True))
        self._known = live
        message = wire.Pass(
            self._crew.epoch,
            self._step,
            _place(came_from),
            _place(to),
            tuple((self._passages[passage], passage.adapter, len(passage.places)) for passage in passages),
            tuple(rows),
            freed,
            ended,
        )
        return message, b"".join(np.ascontiguousarray(part, "<f4").tobytes() for part in parts)

    # --- what fails ---

    def _post(self, message) -> None:
        """To all workers. Raises Restarted."""
        mesh = self._member.mesh
        try:
            mesh.post(list(mesh.endpoints), wire.encode(message))
        except NodeLost as lost:
            raise self._lose(lost) from None

    def _lose(self, lost: NodeLost) -> Restarted:
        """A worker is lost, and with it all that the nodes have of edges."""
        self._loss = lost.node, lost.reason
        self._drop()
        return self._restarted()

    def _drop(self) -> None:
        self._member = None
        self._sequences.clear()
        self._passages.clear()
        self._adapters.clear()
        self._awaited.clear()
        self._known = set(), set()

    def _restarted(self) -> Restarted:
        why = "gets ready again"
        if self._loss is not None:
            node, reason = self._loss
            why = f"its worker {self._crew.plan.nodes[node].name} is lost: {reason}"
        return Restarted(why)


def over_workers(
    settings: ClusterSettings,
    nthreads: int,
    buffer_type: FloatType,
    kv_type: FloatType,
    notify: Callable[[str], None],
    progress: Callable[[str, int, int], None],
) -> Callable[[ModelFile, Callable[[int, int], None]], ClusterBackend]:
    """Makes the backend for a model, as `Cloud` wants it, over this machine and workers; ``progress`` tells of theirs
    too."""

    def make(model: ModelFile, _: Callable[[int, int], None]) -> ClusterBackend:
        return ClusterBackend(model, Team(nthreads), buffer_type, kv_type, settings, notify, progress)

    return make


def _runs(passage: Passage) -> list[tuple[int, int, int, int]]:
    """Rows as runs: sequence, first position, count, context."""
    runs: list[list[int]] = []
    for sequence, position in passage.places:
        if runs and runs[-1][0] == sequence.number and sum(runs[-1][1:3]) == position:
            runs[-1][2] += 1
        else:
            runs.append([sequence.number, position, 1, sequence.capacity])
    return [tuple(run) for run in runs]


def _place(at: Stop | int) -> tuple[int, int]:
    return (at, -1) if isinstance(at, int) else tuple(at)
