"""A plan as one worker gets it: what it says in a message, and what the worker has to do."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from dllama.cluster import wire
from dllama.cluster.all_reduce import AllReduce
from dllama.cluster.deal import head_unit
from dllama.cluster.mesh import Mesh
from dllama.cluster.node import NodeSpec
from dllama.cluster.plan import Plan
from dllama.cluster.rounds import Form
from dllama.cluster.share import Share
from dllama.cluster.slices import SliceLayout
from dllama.engine.adapter_weights import NUMBERS, lay_out
from dllama.engine.workspace import MAX_ROWS
from dllama.errors import PlanError
from dllama.formats import FloatType
from dllama.formats.blocks import BLOCK
from dllama.targets import DENSE, TARGETS


@dataclass(frozen=True)
class Job:
    """One node's part of a plan. ``shares`` and ``addresses`` are those of all nodes, the root's first."""

    epoch: int  # counts the plans of a session
    index: int
    shares: tuple[Share, ...]
    addresses: tuple[str, ...]
    form: Form
    order: tuple[int, ...]  # the nodes' numbers as the rounds of an exchange have them
    buffer_type: FloatType
    kv_type: FloatType
    context: int
    step_timeout: float  # seconds until a node that does not answer counts as lost
    model_digest: bytes
    model_name: str
    adapters: tuple[tuple[int, ...], ...] = ()  # of each the ranks, layer by layer and target by target
    stack: bool = False  # whether it runs the decoder stack in halves, for the edges of PrivateLoRA

    @property
    def share(self) -> Share:
        return self.shares[self.index]

    @cached_property
    def layout(self) -> SliceLayout:
        return SliceLayout(self.share)

    @property
    def ranks(self) -> np.ndarray:
        """Of the adapters: int64 [adapters, layers, targets]."""
        shape = len(self.adapters), self.share.config.n_layers, len(TARGETS)
        return np.array(self.adapters, np.int64).reshape(shape)

    @property
    def memory_bytes(self) -> int:
        """Bytes of memory that it takes."""
        adapters = lay_out(self.ranks, self.share.config, self.layout.info)[1] if self.adapters else 0
        return self.share.memory_bytes(self.context, self.kv_type) + adapters

    def exchange(self, mesh: Mesh) -> AllReduce | None:
        """What sums the nodes' parts; None where there is one node."""
        if len(self.shares) == 1:
            return None
        sums = [share.sums for share in self.shares]
        return AllReduce(mesh, self.index, sums, self.form, self.order, self.buffer_type, self.epoch, MAX_ROWS)

    def describe(self) -> str:
        """For people."""
        share, config = self.share, self.share.config
        return (
            f"{self.model_name}, {len(share.heads)} of {config.n_heads} heads, {len(share.hidden)} of "
            f"{config.ffn_dim} hidden values, {len(share.vocab)} of {config.vocab_size} rows of the vocabulary"
        )

    @classmethod
    def of_plan(
        cls,
        plan: Plan,
        epoch: int,
        index: int,
        step_timeout: float,
        model_digest: bytes,
        model_name: str,
        adapters: tuple[tuple[int, ...], ...] = (),
        stack: bool = False,
    ) -> Job:
        """A node's part of a plan that the root has made."""
        names = ("", *(node.name for node in plan.nodes[1:]))
        how = plan.form, plan.order, plan.buffer_type, plan.kv_type, plan.context
        return cls(epoch, index, plan.shares, names, *how, step_timeout, model_digest, model_name, adapters, stack)

    def message(self) -> wire.Plan:
        """What the root sends."""
        plan = {
            "config": wire.config_values(self.share.config),
            "index": self.index,
            "shares": [_spans(share) for share in self.shares],
            "addresses": list(self.addresses),
            "form": self.form.name,
            "order": list(self.order),
            "buffer_type": int(self.buffer_type),
            "kv_type": int(self.kv_type),
            "context": self.context,
            "adapters": list(map(list, self.adapters)),
            "stack": self.stack,
            "step_timeout": self.step_timeout,
            "model_digest": self.model_digest,
            "model_name": wire.line(self.model_name)[:255],
        }
        return wire.Plan(self.epoch, plan)

    @classmethod
    def of(cls, message: wire.Plan) -> Job:
        """What a worker makes of it. Raises WireError or PlanError for what no sound root sends."""
        plan = message.plan
        config = wire.config_of(plan["config"])
        shares = tuple(
            Share(config, NodeSpec(address or "root"), i == 0, *(range(*span) for span in spans))
            for i, (address, spans) in enumerate(zip(plan["addresses"], plan["shares"], strict=False))
        )
        job = cls(
            message.epoch,
            plan["index"],
            shares,
            tuple(plan["addresses"]),
            Form[plan["form"]],
            tuple(plan["order"]),
            FloatType(plan["buffer_type"]),
            FloatType(plan["kv_type"]),
            plan["context"],
            plan["step_timeout"],
            plan["model_digest"],
            plan["model_name"],
            tuple(map(tuple, plan["adapters"])),
            plan["stack"],
        )
        job._check(len(plan["shares"]))
        return job

    def _check(self, nodes: int) -> None:
        config = self.shares[0].config if self.shares else None
        if not len(self.shares) == len(self.addresses) == nodes or not 0 < self.index < nodes:
            raise PlanError("as many shares as addresses are due, and the receiver's own")
        if sorted(self.order) != list(range(nodes)):
            raise PlanError(f"{nodes} nodes in the order {self.order}")
        if self.context > config.seq_len:
            raise PlanError(f"a context of {self.context} tokens, and the model's is {config.seq_len}")
        ends = (
            ("heads", config.n_heads),
            ("ffn_blocks", -(-config.ffn_dim // BLOCK)),
            ("vocab", config.vocab_size),
            ("sum_blocks", -(-config.dim // BLOCK)),
        )
        for name, end in ends:
            spans = [getattr(share, name) for share in self.shares]
            starts = [0, *(span.stop for span in spans)]
            if [span.start for span in spans] != starts[:-1] or starts[-1] != end:
                raise PlanError(f"the nodes' {name} are not 0 to {end} in their order")
        if not all(share.heads for share in self.shares):
            raise PlanError("a node without heads")
        if any(share.heads.start % head_unit(config) for share in self.shares):
            raise PlanError(f"heads go in units of {head_unit(config)}")
        if any(len(ranks) != config.n_layers * len(TARGETS) for ranks in self.adapters):
            raise PlanError("an adapter has a rank for each target of each layer")
        if config.arch.has_experts and self.ranks[..., [NUMBERS[name] for name in DENSE]].any():
            raise PlanError("an adapter for a mixture of experts leaves the experts alone")
        if self.stack and self.adapters:
            raise PlanError("the adapters of a stack are no part of the plan")


def _spans(share: Share) -> list[list[int]]:
    return [[span.start, span.stop] for span in (share.heads, share.ffn_blocks, share.vocab, share.sum_blocks)]
