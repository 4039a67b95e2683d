"""The root: the engine of a cluster. It plans, gives out slices, runs steps, and mends what breaks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from weakref import WeakSet

from dllama.cluster import wire
from dllama.cluster.crew import Crew
from dllama.cluster.digest import require_unchanged
from dllama.cluster.member import Member
from dllama.cluster.mesh import NodeLost
from dllama.cluster.plan import Plan
from dllama.cluster.settings import ClusterSettings
from dllama.engine.adapters import NO_ADAPTER
from dllama.engine.candidates import Candidates, Reduction, merge, unpack
from dllama.engine.interface import NodeCost, Row
from dllama.engine.rows import Rows
from dllama.engine.workspace import MAX_ROWS
from dllama.errors import ModelError
from dllama.formats import FloatType, ModelFile
from dllama.kernels.team import Team, sigint_held
from dllama.lora import LoraAdapter


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
        self.config, self.context, self.most_rows = model.config, context, MAX_ROWS
        self.cost: tuple[NodeCost, ...] = ()
        self._model = model
        self._step = self._numbers = 0
        self._sequences: WeakSet[ClusterSequence] = WeakSet()
        self._known: set[int] = set()  # numbers of the sequences that the nodes hold
        self._embedding = model.f32("embedding")
        self._embeddings = Rows(buffer_type, self.config.dim)
        self._member: Member | None = None  # None: the nodes have to be made ready
        types = buffer_type, kv_type
        self._crew = Crew(model, team, context, *types, settings, adapters, False, notify, progress)
        self._member = Member(*self._crew.begin())

    @property
    def plan(self) -> Plan:
        """Who holds what."""
        return self._crew.plan

    def sequence(self, adapter: int = NO_ADAPTER) -> ClusterSequence:
        """An empty sequence. Where it is the only one, workers that were lost and are back take part again."""
        if not self._sequences and self._crew.take_back(self._member and self._member.mesh):
            self._member = None
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
                    self._member = Member(*self._crew.start())
                    self._replay()
                found = self._run(rows, wanted, reduction)
                break
            except NodeLost as error:
                lost = error.node, error.reason  # without the frames, which hold the weights
            self._member = None
            self._crew.leave_out(*lost, f"at token {rows[-1].position}")
        for row in rows:
            row.sequence.tokens[row.position :] = [row.token]
        return found

    def close(self) -> None:
        """Lets the workers go."""
        self._crew.close()
        self._member = None

    def _run(self, rows: Sequence[Row], wanted: Sequence[int], reduction: Reduction) -> list[Candidates]:
        """A step over all nodes. Raises NodeLost; after whatever it raises the nodes have to be made ready again."""
        member, self._member = self._member, None
        live = {sequence.number for sequence in self._sequences}
        freed, self._known = self._known - live, live
        self._step += 1
        asked = reduction.to_list()
        message = wire.Step(self._crew.epoch, self._step, _runs(rows), tuple(wanted), asked, tuple(freed))
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
