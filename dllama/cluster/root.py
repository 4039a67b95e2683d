"""The root: the engine of a cluster. It plans, gives out slices, runs steps, and mends what breaks."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from weakref import WeakSet

from dllama.cluster import wire
from dllama.cluster.digest import model_digest, require_unchanged
from dllama.cluster.hub import Hub
from dllama.cluster.job import Job
from dllama.cluster.loading import Loading
from dllama.cluster.member import Embeddings, Member
from dllama.cluster.mesh import Mesh, NodeLost, blamed
from dllama.cluster.node import NodeSpec
from dllama.cluster.plan import Plan
from dllama.cluster.planner import make_plan
from dllama.cluster.recruit import Recruit, dismiss, recruit
from dllama.cluster.settings import ClusterSettings
from dllama.cluster.slices import ModelSlice
from dllama.cluster.supply import Supply
from dllama.engine.adapter_weights import ranks_of, values_of
from dllama.engine.adapters import NO_ADAPTER
from dllama.engine.candidates import Candidates, Reduction, merge, unpack
from dllama.engine.interface import NodeCost, Row
from dllama.engine.memory import available_bytes
from dllama.engine.speed import read_speed
from dllama.engine.workspace import MAX_ROWS
from dllama.errors import ClusterError, ModelError, PlanError
from dllama.formats import FloatType, ModelFile
from dllama.kernels.team import Team, sigint_held
from dllama.lora import LoraAdapter

AGAIN_SECONDS = 0.5
"""How long to try to reach workers that were lost, or were not needed before."""
WORKERS_PATIENCE = 0.8
"""The workers wait for each other so much less long than the root: who waits for a node that hangs tells it, and the
root could only guess which of those that it waits for is to blame."""


class ClusterSequence:
    """A sequence, known to the nodes by its number. The root keeps its tokens, to run them again over other nodes."""

    def __init__(self, number: int, adapter: int):
        self.number, self.adapter = number, adapter
        self.tokens: list[int] = []


class ClusterEngine:
    """A model over this machine and workers: see `Engine`.

    Raises ClusterError for workers that cannot be used, PlanError where the nodes cannot hold the model, and whatever
    loading raises. A worker that is lost later is left out and its work done again; ClusterError only where the rest
    cannot hold the model. ``notify`` and ``progress`` as in `Llama`.
    """

    def __init__(
        self,
        model: ModelFile,
        team: Team,
        context: int,
        buffer_type: FloatType,
        kv_type: FloatType,
        settings: ClusterSettings,
        adapters: Sequence[LoraAdapter],
        notify: Callable[[str], None],
        progress: Callable[[str, int, int], None],
    ):
        self.config, self.context = model.config, context
        self.cost: tuple[NodeCost, ...] = ()
        self._model, self._team, self._settings, self._adapters = model, team, settings, adapters
        self._types = buffer_type, kv_type
        self._notify, self._progress = notify, progress
        self._hub = Hub()
        self._session = secrets.token_bytes(16)
        self._recruits: list[Recruit] = []
        self._lost: list[str] = []  # addresses of workers that may come back
        self._spare: list[str] = []  # and of those that the plan had no use for
        self._epoch = self._step = self._numbers = 0
        self._sequences: WeakSet[ClusterSequence] = WeakSet()
        self._known: set[int] = set()  # numbers of the sequences that the nodes hold
        self._embedding = model.f32("embedding")
        self._embeddings = Embeddings(self.config.dim, buffer_type)
        self.plan: Plan | None = None
        self._member: Member | None = None  # None: the nodes have to be made ready
        try:
            self._recruit(settings.workers, settings.connect_timeout, strict=True)
            self._spec = NodeSpec("root", None, available_bytes(), team.nthreads)
            self._digest = model_digest(model, partial(progress, "reading the model"))
            try:
                self._start()
            except NodeLost as lost:
                raise ClusterError(f"worker {self.plan.nodes[lost.node].name}: {lost.reason}") from None
        except BaseException:
            self.close()
            raise

    def sequence(self, adapter: int = NO_ADAPTER) -> ClusterSequence:
        """An empty sequence. Where it is the only one, workers that were lost and are back take part again."""
        if not self._sequences:
            self._take_back()
        self._numbers += 1
        sequence = ClusterSequence(self._numbers, adapter)
        self._sequences.add(sequence)
        return sequence

    def step(self, rows: Sequence[Row], wanted: Sequence[int], reduction: Reduction) -> list[Candidates]:
        for row in rows:
            if not 0 <= row.token < self.config.vocab_size:
                raise ModelError(f"token {row.token} is outside the vocabulary of {self.config.vocab_size}")
            if not 0 <= row.position < self.context:
                raise ModelError(f"position {row.position} is outside the context of {self.context} tokens")
        require_unchanged(self._model)
        while True:
            try:
                if self._member is None:
                    self._start()
                    self._replay()
                found = self._run(rows, wanted, reduction)
                break
            except NodeLost as error:
                lost = error.node, error.reason  # without the frames, which hold the weights
            self._leave_out(*lost, f"at token {rows[-1].position}")
        for row in rows:
            row.sequence.tokens[row.position :] = [row.token]
        return found

    def close(self) -> None:
        """Lets the workers go."""
        dismiss(self._recruits)
        self._recruits, self._member = [], None

    def _run(self, rows: Sequence[Row], wanted: Sequence[int], reduction: Reduction) -> list[Candidates]:
        """A step over all nodes. Raises NodeLost; after whatever it raises the nodes have to be made ready again."""
        member, self._member = self._member, None
        live = {sequence.number for sequence in self._sequences}
        freed, self._known = self._known - live, live
        self._step += 1
        asked = reduction.to_list()
        message = wire.Step(self._epoch, self._step, _runs(rows), tuple(wanted), asked, tuple(freed))
        payload = self._embeddings.encode(self._embedding[[row.token for row in rows]])
        mesh, others = member.mesh, range(1, len(self.plan.nodes))
        parts: list[list[Candidates]] = [[] for _ in self.plan.nodes]
        costs: list[NodeCost | None] = [None for _ in self.plan.nodes]

        def take(node: int, found: wire.Candidates, payload: Sequence) -> None:
            share = self.plan.shares[node]
            parts[node] = _unpacked(node, found, payload, len(wanted), reduction, share.vocab)
            times = found.inference_us / 1e3, found.transfer_us / 1e3
            costs[node] = NodeCost(share.node.name, *times, found.sent, found.received)

        sent, received = mesh.sent_bytes, mesh.received_bytes
        with sigint_held():  # the nodes would wait for the rest of the step
            for node in others:
                mesh.send(node, message, payload.data)
            parts[0], cost = member.step(message, payload.data)
            mesh.collect(others, self._step, take)
            moved = mesh.sent_bytes - sent, mesh.received_bytes - received
            costs[0] = NodeCost(self.plan.nodes[0].name, cost.inference_ms, cost.transfer_ms, *moved)
            self.cost, self._member = tuple(costs), member
        return [merge(row, reduction) for row in zip(*parts, strict=True)]

    def _replay(self) -> None:
        """Runs the tokens of all sequences over the new nodes. Raises NodeLost."""
        self._known = set()
        for sequence in list(self._sequences):
            rows = [Row(sequence, position, token) for position, token in enumerate(sequence.tokens)]
            for first in range(0, len(rows), MAX_ROWS):
                self._run(rows[first : first + MAX_ROWS], [], Reduction.ALL)

    def _leave_out(self, node: int, reason: str, when: str) -> None:
        """Goes on without a worker."""
        name = self.plan.nodes[node].name
        self._notify(f"worker {name} is lost {when}: {reason}; going on without it")
        self._member = None
        self._dismiss(name)
        self._lost.append(name)
        found = self._recruit(self._spare, AGAIN_SECONDS)
        self._spare = [address for address in self._spare if address not in found]

    def _take_back(self) -> None:
        """Between texts: notices what has happened to the workers meanwhile, and asks those that were lost again."""
        while self._member is not None:
            try:
                self._member.mesh.look()
                break
            except NodeLost as error:
                lost = error.node, error.reason
            self._leave_out(*lost, "before a new text")
        back = self._recruit(self._lost, AGAIN_SECONDS)
        if back:
            self._notify(f"worker {', '.join(back)} is back")
            self._lost = [address for address in self._lost if address not in back]
            self._member = None

    def _recruit(self, addresses: Sequence[str], timeout: float, strict: bool = False) -> list[str]:
        """The addresses of those that are willing. Raises ClusterError for the first that is not, if ``strict``."""
        if not addresses:
            return []
        found, errors = recruit(addresses, self._settings.key, self._session, timeout)
        for worker in found:
            self._hub.add(worker.link)
        order = list(self._settings.workers)
        self._recruits = sorted([*self._recruits, *found], key=lambda worker: order.index(worker.address))
        if strict and errors:
            raise errors[0]
        return [worker.address for worker in found]

    def _dismiss(self, address: str) -> None:
        """Lets a worker go: it is lost, or the plan has no use for it."""
        leaving = [worker for worker in self._recruits if worker.address == address]
        self._recruits = [worker for worker in self._recruits if worker not in leaving]
        dismiss(leaving)

    def _start(self) -> None:
        """Plans for the workers at hand, and gets all nodes ready. Raises PlanError, NodeLost."""
        self._member = None
        self._epoch += 1
        self.plan = self._planned()
        for node, reason in self.plan.left_out:
            self._notify(f"worker {node.name} is left out: {reason}")
            self._dismiss(node.name)
            self._spare.append(node.name)
        about = WORKERS_PATIENCE * self._settings.step_timeout, self._digest, self._model.path.name
        ranks = tuple(tuple(of_one.ravel().tolist()) for of_one in ranks_of(self._adapters, self.config))
        own, *jobs = (Job.of_plan(self.plan, self._epoch, node, *about, ranks) for node in range(len(self.plan.nodes)))
        links = {node: worker.link for node, worker in enumerate(self._recruits, 1)}
        source, progress = ModelSlice(self._model, own.share), partial(self._progress, "loading weights")
        loading = Loading(own, source, self._team, self._notify, progress)
        try:
            Supply(self._model, self._hub, links, dict(enumerate(jobs, 1)), self._adapters, self._progress).run()
            forward = loading.result()
            if forward.adapters is not None:
                forward.adapters.fill(values_of(self._adapters, self.config, own.share.slices))
        finally:
            loading.give_up()
            loading.thread.join()  # the team is free only then
        mesh = Mesh(self._hub, links, self._epoch, self._settings.step_timeout, self._other)
        self._member = Member(own, forward, mesh)

    def _planned(self) -> Plan:
        """The plan for the workers at hand. Raises PlanError, ClusterError."""
        buffer_type, kv_type = self._types
        types = {"buffer_type": buffer_type, "kv_type": kv_type}
        ratios = self._ratios()
        try:
            return make_plan(self.config, self._nodes(ratios is None), ratios, context=self.context, **types)
        except PlanError:
            if not self._lost:
                raise
        try:  # rather with other ratios than not at all
            return make_plan(self.config, self._nodes(True), context=self.context, **types)
        except PlanError as error:
            lost = ", ".join(self._lost)
            raise ClusterError(f"worker {lost} is lost, and the rest cannot hold the model: {error}") from None

    def _nodes(self, by_speed: bool) -> list[NodeSpec]:
        """The nodes at hand. To measure this one's speed takes a while, and is left until shares go by speed."""
        if by_speed and self._spec.read_speed is None:
            self._spec = replace(self._spec, read_speed=read_speed(self._team))
        nodes = [self._spec, *(worker.spec for worker in self._recruits)]
        taken = sum(adapter.nbytes for adapter in self._adapters)  # whole, though a node has a slice of most
        return [node if node.memory is None else replace(node, memory=max(0, node.memory - taken)) for node in nodes]

    def _ratios(self) -> Sequence[float] | None:
        """The user's, for the nodes at hand."""
        ratios = self._settings.ratios
        if ratios is None or len(self._recruits) == len(self._settings.workers):
            return ratios
        root, *workers = ratios
        by_address = dict(zip(self._settings.workers, workers, strict=True))
        return [root, *(by_address[worker.address] for worker in self._recruits)]

    def _other(self, source, message, payload) -> None:
        """What a worker says while others are waited for, and is no part of a step. Raises NodeLost."""
        node = next((n for n, worker in enumerate(self._recruits, 1) if worker.link is source), None)
        if node is None or getattr(message, "epoch", self._epoch) != self._epoch:
            return
        if type(message) is wire.Refuse:
            raise NodeLost(node, message.reason)
        if type(message) is wire.Bye:
            raise NodeLost(node, "it has left")
        if type(message) is wire.Lost:
            raise blamed(message, node, [node.name for node in self.plan.nodes])


def _runs(rows: Sequence[Row]) -> list[tuple[int, int, int, int]]:
    """Rows as runs: sequence, first position, count, adapter."""
    runs: list[list[int]] = []
    for row in rows:
        number = row.sequence.number
        if runs and runs[-1][0] == number and sum(runs[-1][1:3]) == row.position:
            runs[-1][2] += 1
        else:
            runs.append([number, row.position, 1, row.sequence.adapter])
    return [tuple(run) for run in runs]


def _unpacked(
    node: int, found: wire.Candidates, payload: Sequence, wanted: int, reduction: Reduction, rows: range
) -> list[Candidates]:
    """A worker's candidates for each wanted row. Raises NodeLost for what no sound worker sends."""
    data = memoryview(payload[0]) if payload else memoryview(b"")
    if len(found.sizes) != wanted or sum(found.sizes) != data.nbytes:
        raise NodeLost(node, "its candidates are not as many as were asked for")
    out, start = [], 0
    for size in found.sizes:
        try:
            out.append(unpack(data[start : start + size], reduction, rows))
        except ValueError as error:
            raise NodeLost(node, f"its candidates make no sense: {error}") from None
        start += size
    return out
