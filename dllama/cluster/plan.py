"""The plan: who holds what, what it costs in memory, bytes and time."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dllama.cluster import traffic
from dllama.cluster.node import NodeSpec
from dllama.cluster.rounds import Form, partner_of
from dllama.cluster.share import Share
from dllama.cluster.traffic import Round, Traffic
from dllama.formats import FloatType, ModelConfig


class LeftOut(NamedTuple):
    """A node that takes no part, and why."""

    node: NodeSpec
    reason: str


@dataclass(frozen=True)
class Plan:
    """A model dealt out over nodes; ``planner.make_plan`` makes it.

    All figures are for one token of one sequence. Times are None where read speeds are not known.
    """

    config: ModelConfig
    shares: tuple[Share, ...]  # the root's first
    left_out: tuple[LeftOut, ...]
    context: int  # tokens that the KV caches have room for
    kv_type: FloatType
    buffer_type: FloatType  # of what travels between nodes: Q80 or F32
    top_k: int  # likeliest tokens that each node offers to the sampler; 0: all logits

    @property
    def nodes(self) -> tuple[NodeSpec, ...]:
        """Those that take part, the root first."""
        return tuple(share.node for share in self.shares)

    @cached_property
    def order(self) -> tuple[int, ...]:
        """The nodes' numbers, those first that a message takes least, as the rounds of an exchange have them."""
        nbytes = traffic.vector_bytes(self.config.dim, self.buffer_type)
        taken = [node.latency + nbytes / node.bandwidth + traffic.message_seconds(node) for node in self.nodes]
        return tuple(sorted(range(len(taken)), key=taken.__getitem__))

    @cached_property
    def form(self) -> Form:
        """How the nodes sum their parts: in the form that takes less time."""
        return min(Form, key=lambda form: self._seconds(self._rounds[form]))

    @cached_property
    def traffic(self) -> tuple[Traffic, ...]:
        """What each node sends and receives for a token."""
        rounds = self._rounds[self.form]
        return tuple(
            Traffic(
                sum(count * round.traffic[node].sent for round, count in rounds),
                sum(count * round.traffic[node].received for round, count in rounds),
            )
            for node in range(len(self.shares))
        )

    @property
    def exchange_seconds(self) -> float:
        """Time that exchanges add to that in reading; a node that reads less has some of them done meanwhile."""
        seconds = self._seconds(self._rounds[self.form])
        read = self.read_seconds()
        return seconds if read is None else seconds - self._hidden_seconds()

    def held_seconds(self, node: int) -> float:
        """Time for which exchanges keep a node from reading, whatever the others do: the CPU time of its messages, and
        what it waits for its partner in a fold."""
        return traffic.work_seconds(self._rounds[self.form], node, self.nodes[node]) + self._partner_seconds(node)

    def read_seconds(self, position: int = 0) -> float | None:
        """Time in reading weights, and the keys and values of ``position`` earlier tokens.

        The nodes wait for the slowest after each segment, so that it is the sum of each segment's slowest.
        """
        if any(node.read_speed is None for node in self.nodes):
            return None
        nodes = [self.segment_seconds(share, position) for share in self.shares]
        return sum(max(segment) for segment in zip(*nodes, strict=True))

    def segment_seconds(self, share: Share, position: int = 0) -> tuple[float, float, float]:
        """Time that one node reads for attention, FFN (both of all layers) and output rows; speeds have to be known."""
        attention, ffn, output = share.segment_bytes.values()
        attention += position * share.kv_bytes_per_position(self.kv_type)
        return tuple(nbytes / share.node.read_speed for nbytes in (attention, ffn, output))

    def step_seconds(self, position: int = 0) -> float | None:
        """Expected time for the token at ``position``."""
        read = self.read_seconds(position)
        return None if read is None else read + self.exchange_seconds

    def _hidden_seconds(self) -> float:
        """What of the exchanges falls to nodes that would else wait for others to read.

        Counted over a layer's two segments together, as both have the same messages: the slowest in reading plus the
        slowest in messages, less the slowest in both. The first round of a fold and its last hold up only the nodes
        that have messages there: the others go on reading.
        """
        exchange = self._exchange_rounds()
        common = exchange[1:-1] if self.form is Form.FOLD else exchange
        apart = self._seconds(exchange) - self._seconds(common)
        apart += max(traffic.work_seconds(common, i, node) for i, node in enumerate(self.nodes))
        reads = [sum(self.segment_seconds(share)[:2]) for share in self.shares]
        held = (traffic.work_seconds(exchange, i, node) + self._partner_seconds(i) for i, node in enumerate(self.nodes))
        return max(reads) + apart - max(map(sum, zip(reads, held, strict=True)))

    def _partner_seconds(self, node: int) -> float:
        """What a node outside a fold waits for its partner: until its part is there, until that has met all others,
        and until their sum is back."""
        partner = partner_of(self.form, self.order, node)
        if partner is None:
            return 0.0
        exchange = self._exchange_rounds()
        ways = (
            count * traffic.way_seconds(round.traffic[node], self.nodes[node])
            for round, count in (exchange[0], exchange[-1])
        )
        return sum(ways) + traffic.work_seconds(exchange, partner, self.nodes[partner])

    def _exchange_rounds(self) -> list[tuple[Round, int]]:
        """Those of a layer."""
        return [each for each in self._rounds[self.form] if each[1] > 1]

    @cached_property
    def _rounds(self) -> dict[Form, list[tuple[Round, int]]]:
        """Of each form."""
        return {form: traffic.rounds(form, self.order, self.shares, self.buffer_type, self.top_k) for form in Form}

    def _seconds(self, rounds: list[tuple[Round, int]]) -> float:
        return sum(count * traffic.seconds(round, self.nodes) for round, count in rounds)
