"""Who takes part and how much each node holds.

Nodes get shares in proportion to their speed, or to ratios that the user gives. A node whose memory is too small for
its share gets less, and the others more; ratios are kept as they are. A worker that makes tokens slower, as what it
takes over is worth less than what it adds to the exchanges, is left out, unless ratios ask for it.
"""

import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import combinations, product

from dllama.cluster.deal import deal_heads
from dllama.cluster.fit import NoShare, fit
from dllama.cluster.node import NodeSpec
from dllama.cluster.plan import LeftOut, Plan
from dllama.errors import PlanError
from dllama.formats import FloatType, ModelConfig


def make_plan(
    config: ModelConfig,
    nodes: Sequence[NodeSpec],
    ratios: Sequence[float] | None = None,
    *,
    context: int | None = None,
    kv_type: FloatType = FloatType.F16,
    buffer_type: FloatType = FloatType.Q80,
    top_k: int = 1,
) -> Plan:
    """Deal a model out over nodes, the first of them the root. The same arguments give the same plan.

    ratios: how much each node gets, relative to the others. None: by read speed, or by threads where no node's speed
        is known; then every node takes part that can hold a head
    context: tokens that the KV caches have room for; None is the model's own
    top_k: likeliest tokens that each node offers to the sampler; 1 is greedy, 0 sends all logits

    Raises PlanError for a node given twice, more nodes than heads, ratios that do not match the nodes, without ratios
    speeds of some nodes only, a context the model does not have, and nodes whose memory does not hold the model.
    """
    context = config.seq_len if context is None else context
    weights = _weights(nodes, ratios)
    if not 0 < context <= config.seq_len:
        raise PlanError(f"a context of {context} tokens, and the model's is {config.seq_len}")
    empty = Plan(config, (), (), context, kv_type, buffer_type, top_k)
    return _Planner(empty, dict(zip(nodes, weights, strict=True)), fixed=ratios is not None).plan()


def _weights(nodes: Sequence[NodeSpec], ratios: Sequence[float] | None) -> Sequence[float]:
    if not nodes:
        raise PlanError("no nodes to plan for")
    names = [node.name for node in nodes]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise PlanError(f"node {twice} is given twice")
    if ratios is not None:
        if len(ratios) != len(nodes):
            raise PlanError(f"{len(ratios)} ratios for the nodes {', '.join(names)}: each needs one, the root's first")
        for name, ratio in zip(names, ratios, strict=True):
            if not 0 < ratio < math.inf:
                raise PlanError(f"node {name}: its ratio is {ratio:g}, and has to be a number above 0")
        return ratios
    unknown = [node.name for node in nodes if node.read_speed is None]
    if 0 < len(unknown) < len(nodes):
        raise PlanError(f"the read speed of node {unknown[0]} is not known, and that of others is: give all or none")
    return [node.threads if unknown else node.read_speed for node in nodes]


STRENGTHS: tuple[Callable[[NodeSpec], float], ...] = (
    lambda node: node.read_speed,
    lambda node: math.inf if node.memory is None else node.memory,
    lambda node: node.bandwidth,
    lambda node: -node.latency,
)
"""Each the larger the better."""

STRONGEST = 4
"""So many nodes that are the best in one respect are tried as new ones. A search among 30 nodes that tries all of them
takes several times as long, and hardly finds better plans."""


def _few(nodes: Iterable[NodeSpec]) -> list[tuple[NodeSpec, ...]]:
    """None, one or two of them."""
    nodes = list(nodes)
    return [(), *combinations(nodes, 1), *combinations(nodes, 2)]


class _Planner:
    """The search for the best plan.

    empty: a plan without shares;  weights: of each node, the root first;  fixed: whether weights are to be kept
    """

    def __init__(self, empty: Plan, weights: dict[NodeSpec, float], fixed: bool):
        self._empty, self._weights, self._fixed = empty, weights, fixed
        self._tried: dict[frozenset[NodeSpec], Plan | None] = {}

    def plan(self) -> Plan:
        deal_heads(self._empty.config, list(self._weights.values()))  # too many nodes are an error, however slow
        plan, reasons = self._largest(self._weights)
        if not self._fixed and plan.nodes[0].read_speed is not None:
            plan = self._fastest(plan)
            reasons = {node: self._reason(plan, node) for node in self._weights if node not in plan.nodes}
        return replace(plan, left_out=tuple(LeftOut(node, reasons[node]) for node in self._weights if node in reasons))

    def _largest(self, nodes: Collection[NodeSpec]) -> tuple[Plan, dict[NodeSpec, str]]:
        """The plan over all of these nodes that get a share beside the others, and why the rest does not."""
        nodes, reasons = set(nodes), {}
        while True:
            try:
                return self._over(nodes), reasons
            except NoShare as none:
                nodes.remove(none.node)
                reasons[none.node] = none.reason

    def _fastest(self, plan: Plan) -> Plan:
        """The fastest plan over some of the nodes, as a search finds it.

        Workers are taken away one by one, down to the root, each time the one without which the rest is fastest. From
        the best of these plans on, a worker is taken away, added or replaced, as long as that makes it faster.
        """
        best = plan
        while plan := min(self._near(plan, new=()), key=Plan.step_seconds, default=None):
            best = min(best, plan, key=Plan.step_seconds)
        while True:
            near = min(self._near(best, new=self._weights), key=Plan.step_seconds, default=best)
            if near.step_seconds() >= best.step_seconds():
                return best
            best = near

    def _near(self, plan: Plan, new: Iterable[NodeSpec]) -> Iterator[Plan]:
        """Plans over these nodes without one or two workers that are the weakest in some respect, with one or two new
        ones that are among the strongest in some, and both. Two, as even numbers of nodes exchange in fewer messages.
        And plans without any number of those that are the weakest in one respect, as all wait for the slowest of them.
        """
        workers = plan.nodes[:0:-1]  # of equals the last goes first
        ranks = [sorted(workers, key=strength) for strength in STRENGTHS if workers]
        weakest = dict.fromkeys(rank[0] for rank in ranks)
        others = [node for node in new if node not in plan.nodes]
        strongest = dict.fromkeys(
            node for strength in STRENGTHS for node in sorted(others, key=strength, reverse=True)[:STRONGEST]
        )
        changes = {(frozenset(gone), added) for gone, added in product(_few(weakest), _few(strongest))}
        changes |= {(frozenset(rank[:count]), ()) for rank in ranks for count in range(1, len(rank) + 1)}
        for gone, added in changes - {(frozenset(), ())}:
            found = self._try({*(node for node in plan.nodes if node not in gone), *added})
            if found:
                yield found

    def _reason(self, plan: Plan, node: NodeSpec) -> str:
        """Why a plan is better off without a node."""
        try:
            larger, reasons = self._largest({*plan.nodes, node})
        except PlanError:
            return "no share fits its memory beside the others"
        if node in reasons:
            return reasons[node]
        with_it, without = (1000 * p.step_seconds() for p in (larger, plan))
        return f"it is too slow to help: a token takes {with_it:.1f} ms with it, {without:.1f} ms without"

    def _try(self, nodes: Iterable[NodeSpec]) -> Plan | None:
        """The plan over these nodes, None where there is none. The search comes by most of them more than once."""
        nodes = frozenset(nodes)
        if nodes not in self._tried:
            try:
                self._tried[nodes] = self._over(nodes)
            except (PlanError, NoShare):
                self._tried[nodes] = None
        return self._tried[nodes]

    def _over(self, nodes: Collection[NodeSpec]) -> Plan:
        """The plan over exactly these nodes, the root first as ever."""
        weights = {node: weight for node, weight in self._weights.items() if node in nodes}
        plan = self._with(weights)
        if self._fixed or plan.step_seconds() is None or len(weights) == 1:
            return plan
        try:
            relieved = self._with(_relieved(plan, weights))
        except (PlanError, NoShare):
            return plan
        return min(plan, relieved, key=Plan.step_seconds)

    def _with(self, weights: dict[NodeSpec, float]) -> Plan:
        empty = self._empty
        return replace(empty, shares=fit(empty.config, weights, empty.context, empty.kv_type, self._fixed))


def _relieved(plan: Plan, speeds: dict[NodeSpec, float]) -> dict[NodeSpec, float]:
    """Weights with which all nodes of a plan would be done at the same time, exchanges included: those keep a slow node
    for longer, so that it has less time for products. With s of time in exchanges, v bytes a second and B bytes in all,
    a node works (t - s)·v of them until t; t is where these are all."""
    nbytes = sum(share.weight_bytes for share in plan.shares)
    held = {node: plan.held_seconds(number) for number, node in enumerate(plan.nodes)}
    busy = list(speeds)
    while True:
        t = (nbytes + sum(held[node] * speeds[node] for node in busy)) / sum(speeds[node] for node in busy)
        late = [node for node in busy if held[node] >= t]
        if not late:
            break
        busy = [node for node in busy if node not in late]
    return {node: max((t - held[node]) * speed, speed * 1e-9) for node, speed in speeds.items()}
