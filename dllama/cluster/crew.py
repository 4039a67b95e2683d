"""The nodes that a root has at its disposal: it plans for them, gets them ready, and goes on without lost ones."""

from __future__ import annotations

import secrets
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from dllama.cluster import wire
from dllama.cluster.digest import model_digest
from dllama.cluster.earlier import Earlier
from dllama.cluster.hub import Hub
from dllama.cluster.job import Job
from dllama.cluster.links import LinkLost
from dllama.cluster.loading import Loading, Made
from dllama.cluster.mesh import Mesh, NodeLost, blamed
from dllama.cluster.node import NodeSpec
from dllama.cluster.plan import Plan
from dllama.cluster.planner import make_plan
from dllama.cluster.recruit import Recruit, dismiss, recruit
from dllama.cluster.settings import ClusterSettings
from dllama.cluster.slices import ModelSlice
from dllama.cluster.speeds import speeds_together
from dllama.cluster.supply import Supply
from dllama.engine.adapter_weights import ranks_of, values_of
from dllama.engine.memory import available_bytes
from dllama.errors import ClusterError, PlanError
from dllama.formats import FloatType, ModelFile
from dllama.kernels.team import Team
from dllama.lora import LoraAdapter

AGAIN_SECONDS = 0.5
"""How long to try to reach workers that were lost, or were not needed before."""
WORKERS_PATIENCE = 0.8
"""The workers wait for each other so much less long than the root: who waits for a node that hangs tells it, and the
root could only guess which of those that it waits for is to blame."""


class Post(NamedTuple):
    """The root's own place among nodes that are ready: its job, what it made of its slice, its links to the others."""

    job: Job
    made: Made
    mesh: Mesh


class Crew:
    """This machine and the workers of a cluster. ``context``: tokens that there has to be room for; ``adapters``: those
    of all plans; ``stack``: whether the nodes run the decoder stack in halves, for edges.

    Raises ClusterError for workers that cannot be used. ``notify`` and ``progress`` as in `Llama`.

    plan: of the nodes that are ready, or were;  epoch: counts the plans
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
        stack: bool,
        notify: Callable[[str], None],
        progress: Callable[[str, int, int], None],
    ):
        self._model, self._team, self._settings, self._adapters = model, team, settings, adapters
        self._context, self._types, self._stack = context, (buffer_type, kv_type), stack
        self._notify, self._progress = notify, progress
        self._earlier = Earlier(notify)
        self._hub = Hub()
        self._session = secrets.token_bytes(16)
        self._recruits: list[Recruit] = []
        self._lost: list[str] = []  # addresses of workers that may come back
        self._spare: list[str] = []  # and of those that the plan had no use for
        self.plan: Plan | None = None
        self.epoch = 0
        try:
            self._recruit(settings.workers, settings.connect_timeout, strict=True)
            self._spec = NodeSpec("root", None, available_bytes(), team.nthreads)
            self._digest = model_digest(model, partial(progress, "reading the model"))
        except BaseException:
            self.close()
            raise

    def begin(self, other: Callable = lambda node, message: None) -> Post:
        """As ``start``, for the first time: a worker that is lost is a mistake. Raises ClusterError, PlanError."""
        try:
            return self.start(other)
        except NodeLost as lost:
            error = ClusterError(f"worker {self.plan.nodes[lost.node].name}: {lost.reason}")
        except BaseException:
            self.close()
            raise
        self.close()
        raise error

    def start(self, other: Callable = lambda node, message: None) -> Post:
        """Plans for the workers at hand, and gets all nodes ready. Raises PlanError, NodeLost.

        ``other(node, message)`` is called with what a worker says while parts are waited for, and is neither a part nor
        its end.
        """
        self.epoch += 1
        self.plan = self._planned_with_those_there()
        for node, reason in self.plan.left_out:
            self._notify(f"worker {node.name} is left out: {reason}")
            self._dismiss(node.name)
            self._spare.append(node.name)
        config = self._model.config
        about = WORKERS_PATIENCE * self._settings.step_timeout, self._digest, self._model.path.name
        ranks = tuple(tuple(of_one.ravel().tolist()) for of_one in ranks_of(self._adapters, config))
        nodes = range(len(self.plan.nodes))
        own, *jobs = (Job.of_plan(self.plan, self.epoch, node, *about, ranks, self._stack) for node in nodes)
        links = {node: worker.link for node, worker in enumerate(self._recruits, 1)}
        source, progress = ModelSlice(self._model, own.share), partial(self._progress, "loading weights")
        loading = Loading(own, source, self._team, self._notify, progress)
        try:
            Supply(self._model, self._hub, links, dict(enumerate(jobs, 1)), self._adapters, self._progress).run()
            made = loading.result()
            if own.adapters:
                made.adapters.fill(values_of(self._adapters, config, own.share.slices))
        finally:
            loading.give_up()
            loading.thread.join()  # the team is free only then
        hear = partial(self._hear, other)
        return Post(own, made, Mesh(self._hub, links, self.epoch, self._settings.step_timeout, hear))

    def leave_out(self, node: int, reason: str, when: str) -> None:
        """Goes on without a worker, whom the next plan will not have."""
        self._leave_out(self.plan.nodes[node].name, reason, when)

    def take_back(self, mesh: Mesh | None) -> bool:
        """Between texts: notices what has happened to the workers meanwhile, and asks those that were lost again.
        Whether the nodes have to be made ready anew. ``mesh``: of those that are."""
        lost = None
        if mesh is not None:
            try:
                mesh.look()
            except NodeLost as error:
                lost = error.node, error.reason
        if lost:
            self.leave_out(*lost, "before a new text")
        back = self._recruit(self._lost, AGAIN_SECONDS)
        if back:
            self._notify(f"worker {', '.join(back)} is back")
            self._lost = [address for address in self._lost if address not in back]
        return bool(lost or back)

    def close(self) -> None:
        """Lets the workers go."""
        dismiss(self._recruits)
        self._recruits = []

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

    def _leave_out(self, name: str, reason: str, when: str) -> None:
        self._notify(f"worker {name} is lost {when}: {reason}; going on without it")
        self._dismiss(name)
        self._lost.append(name)
        found = self._recruit(self._spare, AGAIN_SECONDS)
        self._spare = [address for address in self._spare if address not in found]

    def _dismiss(self, address: str) -> None:
        """Lets a worker go: it is lost, or the plan has no use for it."""
        leaving = [worker for worker in self._recruits if worker.address == address]
        self._recruits = [worker for worker in self._recruits if worker not in leaving]
        dismiss(leaving)

    def _planned_with_those_there(self) -> Plan:
        """The plan for the workers at hand, without those that are lost meanwhile. The first time such a one is a
        mistake. Raises PlanError, ClusterError."""
        while True:
            try:
                return self._planned()
            except LinkLost as lost:
                name, reason = lost.source.name, lost.reason
            if self.plan is None:
                raise ClusterError(f"worker {name}: {reason}")
            self._leave_out(name, reason, "while the nodes were measured")

    def _planned(self) -> Plan:
        """The plan for the workers at hand. Raises PlanError, ClusterError, and LinkLost where they are measured."""
        config, (buffer_type, kv_type) = self._model.config, self._types
        types = {"buffer_type": buffer_type, "kv_type": kv_type}
        ratios = self._ratios()
        try:
            return make_plan(config, self._nodes(ratios is None), ratios, context=self._context, **types)
        except PlanError:
            if not self._lost:
                raise
        try:  # rather with other ratios than not at all
            return make_plan(config, self._nodes(True), context=self._context, **types)
        except PlanError as error:
            lost = ", ".join(self._lost)
            raise ClusterError(f"worker {lost} is lost, and the rest cannot hold the model: {error}") from None

    def _nodes(self, by_speed: bool) -> list[NodeSpec]:
        """The nodes at hand. To measure them takes a while, and is left until shares go by speed. Until then what the
        workers tell of themselves says nothing either, nor does it where a local worker was not measured."""
        by_speed = by_speed and all(worker.spec.read_speed for worker in self._recruits)
        nodes = [self._spec, *(worker.spec for worker in self._recruits)]
        root, *workers = self._earlier.settled(nodes, self._measured) if by_speed else nodes
        if workers:  # each was measured with this node at the other end
            latency, bandwidth = min(each.latency for each in workers), max(each.bandwidth for each in workers)
            root = replace(root, latency=latency, bandwidth=bandwidth)
        nodes = [root, *workers]
        if not by_speed:
            nodes = [replace(node, read_speed=None) for node in nodes]
        taken = sum(adapter.nbytes for adapter in self._adapters)  # whole, though a node has a slice of most
        return [node if node.memory is None else replace(node, memory=max(0, node.memory - taken)) for node in nodes]

    def _measured(self) -> list[float]:
        """The speeds of the nodes at hand. Raises LinkLost."""
        self._notify("measuring how fast the nodes are, all at once")
        return speeds_together(self._team, [worker.link for worker in self._recruits], self.epoch)

    def _ratios(self) -> Sequence[float] | None:
        """The user's, for the nodes at hand."""
        ratios = self._settings.ratios
        if ratios is None or len(self._recruits) == len(self._settings.workers):
            return ratios
        root, *workers = ratios
        by_address = dict(zip(self._settings.workers, workers, strict=True))
        return [root, *(by_address[worker.address] for worker in self._recruits)]

    def _hear(self, other: Callable, source, message, payload) -> None:
        """What a worker says while others are waited for, and is no part of a step. Raises NodeLost."""
        node = next((n for n, worker in enumerate(self._recruits, 1) if worker.link is source), None)
        if node is None or getattr(message, "epoch", self.epoch) != self.epoch:
            return
        if type(message) is wire.Refuse:
            raise NodeLost(node, message.reason)
        if type(message) is wire.Bye:
            raise NodeLost(node, "it has left")
        if type(message) is wire.Lost:
            raise blamed(message, node, [node.name for node in self.plan.nodes])
        other(node, message)
