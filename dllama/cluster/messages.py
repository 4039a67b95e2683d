"""What nodes say to each other, one class for each kind of message; ``wire`` has their bounds and their form."""

from collections.abc import Sequence
from typing import NamedTuple


class Hello(NamedTuple):
    """root -> worker, edge -> cloud: the first message."""

    protocol: int
    version: str  # of the package
    session: bytes  # 16 random bytes that the nodes of one cluster know each other by
    role: str


class Welcome(NamedTuple):
    """worker -> root, cloud -> edge: the answer to Hello."""

    protocol: int
    version: str
    name: str
    threads: int
    free_memory: int | None  # bytes
    read_speed: float | None  # bytes of weights a second
    kernels: str
    model_digest: bytes | None  # of the worker's own copy of a model


class Refuse(NamedTuple):
    """worker -> root, at any time: it cannot do that."""

    reason: str


class Probe(NamedTuple):
    """root -> worker with a payload, and back without: round trip and speed of the link."""

    number: int


class Measure(NamedTuple):
    """root -> worker: measure how fast you are, now, as all others do."""

    epoch: int  # of the plan that it is for
    round: int


class Measured(NamedTuple):
    """worker -> root: that is how fast."""

    epoch: int
    round: int
    read_speed: float  # bytes of weights a second


class Plan(NamedTuple):
    """root -> worker: who holds what. ``plan`` is a dict with the keys of PLAN."""

    epoch: int
    plan: dict


class Need(NamedTuple):
    """worker -> root: whether it has its whole slice. If not: the digests of the chunks that it has, in the payload,
    16 bytes for each chunk and zeros for those that it has not."""

    epoch: int
    has_all: bool


class NeedAdapters(NamedTuple):
    """worker -> root: its weights are loaded, and there is room for its slice of the adapters."""

    epoch: int


class Chunk(NamedTuple):
    """root -> worker: one chunk of its slice, of the model or then of the adapters, in the payload."""

    epoch: int
    index: int
    digest: bytes  # blake2b of the payload, 16 bytes


class Got(NamedTuple):
    """worker -> root: a chunk has arrived whole."""

    epoch: int
    index: int


class Join(NamedTuple):
    """worker -> worker: the first message on their link."""

    session: bytes
    epoch: int
    index: int  # the sender's, among the plan's nodes


class Joined(NamedTuple):
    """worker -> worker: the answer to Join."""

    epoch: int
    index: int


class Loading(NamedTuple):
    """worker -> root: how many bytes of its slice it has loaded."""

    epoch: int
    done: int
    total: int


class Ready(NamedTuple):
    """worker -> root: its slice is loaded and all its links are up."""

    epoch: int
    load_ms: float


class Step(NamedTuple):
    """root -> worker: run these rows. Payload: their embedding, [rows, dim] in the buffers' type."""

    epoch: int
    step: int
    rows: Sequence[tuple[int, int, int, int]]  # runs of rows: sequence, first position, count, number of its adapter
    wanted: Sequence[int]  # rows whose logits are wanted
    reduction: Sequence  # what each node does to its logits, as `Reduction.to_list` gives it
    freed: Sequence[int]  # sequences whose caches nobody needs any more


class Part(NamedTuple):
    """node -> node: a part of a sum, or a sum, in the payload."""

    epoch: int
    step: int
    round: int


class Candidates(NamedTuple):
    """worker -> root: what the sampler needs of its rows of the vocabulary, in the payload, and how the step went."""

    epoch: int
    step: int
    sizes: Sequence[int]  # bytes of the payload for each wanted row
    inference_us: int
    transfer_us: int
    sent: int  # bytes
    received: int


class Lost(NamedTuple):
    """worker -> root: its link to another worker broke."""

    epoch: int
    index: int  # the other's
    reason: str


class Beat(NamedTuple):
    """node -> node: alive, and waiting for others."""


class Bye(NamedTuple):
    """root -> worker: the end; free everything. And back, when that is done."""


class Open(NamedTuple):
    """edge -> cloud: which layers it wants worked, and with which adapter. ``session`` is a dict with the keys of
    SESSION."""

    session: dict


class Opened(NamedTuple):
    """cloud -> edge: steps may come."""

    device: str  # that works them, for people


class Enter(NamedTuple):
    """edge -> cloud: a step. Payload: the residual stream of its rows as it enters the first of the cloud's layers."""

    step: int
    rows: Sequence[tuple[int, int, int]]  # runs of rows: sequence, first position, count
    wanted: Sequence[int]  # rows whose residual stream is wanted in the end
    freed: Sequence[int]  # sequences whose caches the edge needs no more


class Low(NamedTuple):
    """cloud -> edge: A·x of the adapted targets of a product, one after another for each row, in the payload."""

    step: int
    layer: int
    product: int


class Answer(NamedTuple):
    """edge -> cloud: M·A·x of the same, in the payload."""

    step: int
    layer: int
    product: int


class Leave(NamedTuple):
    """cloud -> edge: the step is done. Payload: the residual stream of the wanted rows after the cloud's layers."""

    step: int
    inference_us: int  # that the cloud was at work for it


class Pass(NamedTuple):
    """root -> worker: take passages of edges' steps on, all of them from the same place to the same place. Payload:
    what enters the layers, or the edges' answers.

    A place is a layer and a product, at whose stop they are, or a layer and -1: in front of it they enter or leave.
    """

    epoch: int
    step: int  # and the next number too: parts of A·x have that one
    start: tuple[int, int]
    stop: tuple[int, int]
    passages: Sequence[tuple[int, int, int]]  # number, number of the adapter, rows
    rows: Sequence[tuple[int, int, int, int]]  # of those that enter: runs of sequence, first position, count, context
    freed: Sequence[int]  # sequences that nobody needs any more
    ended: Sequence[int]  # and passages


class Adapt(NamedTuple):
    """root -> worker: make the adapter of this number ready, out of its seed, or free it where there is none.
    ``adapter`` is a dict with the keys of SEEDED."""

    epoch: int
    number: int
    adapter: dict | None


class Adapted(NamedTuple):
    """worker -> root: the adapter is ready, or why it cannot be."""

    epoch: int
    number: int
    problem: str | None
