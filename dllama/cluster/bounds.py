"""The bounds of all messages: what each field may hold, and how large each payload may be."""

from typing import NamedTuple

from dllama.cluster import messages
from dllama.cluster.rounds import Form
from dllama.cluster.schema import (
    Checker,
    boolean,
    data,
    integer,
    listing,
    mapping,
    one_of,
    optional,
    real,
    row,
    span,
    text,
)
from dllama.engine.candidates import MAX_RECENT
from dllama.formats.blocks import FloatType
from dllama.formats.config import MAX_DIM, MAX_EXPERTS, MAX_SEQ_LEN, MAX_VOCAB, Activation, Arch, RopeType
from dllama.privatelora.frozen import MAX_SEED
from dllama.privatelora.shape import MAX_RANK
from dllama.targets import TARGETS

PROTOCOL = 6
"""Changes with any message; nodes of different protocols refuse each other."""

MAX_NODES = 256
MAX_TEXT = 4096
MAX_LAYERS = 1024
MAX_ADAPTERS = 64
MAX_CHUNK = 1 << 20
"""Bytes of weights in one message."""

MAX_HEADER = 1 << 16
MAX_PLAN_HEADER = 1 << 20
MAX_ITEMS = 1 << 14


COUNT = integer(0, 1 << 32)
BYTES = integer(0, 1 << 50)
SPEED = real(1, 1e15)  # bytes a second
INDEX = integer(0, MAX_NODES - 1)
DIGEST = data(16)
DIM = integer(1, MAX_DIM)
FACTOR = real(0, 1 << 20)

REDUCTION = row(
    real(0, 1e30),
    integer(0, MAX_VOCAB),
    real(0, 1),
    real(0, 1),
    real(0, 1e30),
    listing(integer(0, MAX_VOCAB), MAX_RECENT),
)
"""Temperature, top-k, min-p, share of negligible tokens, repetition penalty, recent tokens."""

PLAN: dict[str, Checker] = {
    "config": mapping(
        {
            "arch": one_of(*Arch),
            **dict.fromkeys(("dim", "hidden_dim"), DIM),
            "n_layers": integer(1, MAX_LAYERS),
            **dict.fromkeys(("n_heads", "n_kv_heads", "head_dim"), DIM),
            "vocab_size": integer(1, MAX_VOCAB),
            "seq_len": integer(1, MAX_SEQ_LEN),
            "norm_epsilon": real(0, 1),
            "rope_theta": real(1, 1 << 31),
            "rope_type": one_of(*RopeType),
            "rope_scaling_factor": FACTOR,
            "rope_scaling_low_freq_factor": FACTOR,
            "rope_scaling_high_freq_factor": FACTOR,
            "rope_scaling_orig_seq_len": integer(0, MAX_SEQ_LEN),
            "weight_type": one_of(*FloatType),
            "activation": one_of(*Activation),
            **dict.fromkeys(("n_experts", "n_active_experts"), integer(0, MAX_EXPERTS)),
            "moe_hidden_dim": integer(0, MAX_DIM),
        }
    ),
    "index": INDEX,  # the receiver's, among the nodes; the root's is 0
    "shares": listing(row(span(MAX_DIM), span(MAX_DIM), span(MAX_VOCAB), span(MAX_DIM)), MAX_NODES),
    "addresses": listing(text(MAX_TEXT), MAX_NODES),  # where each node's port is; the root's is ""
    "form": one_of(*(form.name for form in Form)),
    "order": listing(INDEX, MAX_NODES),  # the nodes' numbers as the rounds of an exchange have them
    "buffer_type": one_of(FloatType.F32, FloatType.Q80),
    "kv_type": one_of(FloatType.F32, FloatType.F16, FloatType.Q80),
    "context": integer(1, MAX_SEQ_LEN),
    "adapters": listing(listing(integer(0, MAX_RANK), MAX_LAYERS * len(TARGETS)), MAX_ADAPTERS),
    "stack": boolean,  # whether the nodes run it in halves, for edges
    "step_timeout": real(1e-3, 1e6),  # seconds until a node that does not answer counts as lost
    "model_digest": DIGEST,
    "model_name": text(255),  # for people
}
"""Keys of the plan that a worker gets. Shares are [heads, ffn_blocks, vocab, sum_blocks], one for each node; of each
adapter the plan has the rank in each layer for each target."""


SHAPE: dict[str, Checker] = {
    **dict.fromkeys(("r_c2d", "r_d2c"), integer(1, MAX_RANK)),
    "targets": listing(one_of(*TARGETS), len(TARGETS)),
    "layers": listing(integer(0, MAX_LAYERS - 1), MAX_LAYERS),
}
"""Keys of what an edge's adapter is like."""

SEEDED: dict[str, Checker] = {**SHAPE, "seed": integer(0, MAX_SEED), "worked": span(MAX_LAYERS)}
"""Keys of an adapter that each node makes itself, for the layers that are worked."""

SESSION: dict[str, Checker] = {
    "model_digest": DIGEST,
    "layers": span(MAX_LAYERS),  # that the cloud works
    "context": integer(1, MAX_SEQ_LEN),
    "form": one_of(FloatType.F32, FloatType.F16, FloatType.Q80),  # of all values that travel
    "adapter": optional(
        mapping(
            {
                **SHAPE,
                "fingerprint": text(64),
                "seed": optional(integer(0, MAX_SEED)),  # None: the cloud has A and B in a file
            }
        )
    ),
}
"""Keys of what an edge asks for."""


class Kind(NamedTuple):
    """One kind of message: its number, its fields' checkers in order, and its payload."""

    number: int
    fields: dict[str, Checker]
    payload: int = 0  # the most bytes of its payload; 0: it has none
    must_have_payload: bool = True
    header: int = MAX_HEADER  # the most bytes of its header


SCHEMA: dict[type, Kind] = {
    messages.Hello: Kind(
        1,
        {
            "protocol": integer(PROTOCOL, PROTOCOL),
            "version": text(64),
            "session": DIGEST,
            "role": one_of("root", "edge"),
        },
    ),
    messages.Welcome: Kind(
        2,
        {
            "protocol": integer(PROTOCOL, PROTOCOL),
            "version": text(64),
            "name": text(255),
            "threads": integer(1, 1 << 12),
            "free_memory": optional(BYTES),
            "read_speed": optional(SPEED),
            "kernels": text(64),
            "model_digest": optional(DIGEST),
        },
    ),
    messages.Refuse: Kind(3, {"reason": text(MAX_TEXT)}),
    messages.Probe: Kind(4, {"number": COUNT}, payload=1 << 26, must_have_payload=False),
    messages.Plan: Kind(5, {"epoch": COUNT, "plan": mapping(PLAN)}, header=MAX_PLAN_HEADER),
    messages.Need: Kind(6, {"epoch": COUNT, "has_all": boolean}, payload=1 << 26, must_have_payload=False),
    messages.Chunk: Kind(7, {"epoch": COUNT, "index": COUNT, "digest": DIGEST}, payload=MAX_CHUNK),
    messages.Got: Kind(8, {"epoch": COUNT, "index": COUNT}),
    messages.Join: Kind(9, {"session": DIGEST, "epoch": COUNT, "index": INDEX}),
    messages.Joined: Kind(10, {"epoch": COUNT, "index": INDEX}),
    messages.Loading: Kind(11, {"epoch": COUNT, "done": BYTES, "total": BYTES}),
    messages.Ready: Kind(12, {"epoch": COUNT, "load_ms": real(0, 1e12)}),
    messages.Step: Kind(
        13,
        {
            "epoch": COUNT,
            "step": COUNT,
            "rows": listing(
                row(COUNT, integer(0, MAX_SEQ_LEN), integer(1, MAX_SEQ_LEN), integer(-1, MAX_ADAPTERS - 1)),
                MAX_ITEMS,
            ),
            "wanted": listing(integer(0, MAX_SEQ_LEN), MAX_ITEMS),
            "reduction": REDUCTION,
            "freed": listing(COUNT, MAX_ITEMS),
        },
        payload=1 << 31,
        must_have_payload=False,
    ),
    messages.Part: Kind(14, {"epoch": COUNT, "step": COUNT, "round": COUNT}, payload=1 << 31),
    messages.Candidates: Kind(
        15,
        {
            **dict.fromkeys(("epoch", "step"), COUNT),
            "sizes": listing(COUNT, MAX_ITEMS),
            **dict.fromkeys(("inference_us", "transfer_us", "sent", "received"), BYTES),
        },
        payload=1 << 31,
        must_have_payload=False,
    ),
    messages.Lost: Kind(16, {"epoch": COUNT, "index": INDEX, "reason": text(MAX_TEXT)}),
    messages.Beat: Kind(17, {}),
    messages.Bye: Kind(18, {}),
    messages.NeedAdapters: Kind(19, {"epoch": COUNT}),
    messages.Open: Kind(20, {"session": mapping(SESSION)}),
    messages.Opened: Kind(21, {"device": text(255)}),
    messages.Enter: Kind(
        22,
        {
            "step": COUNT,
            "rows": listing(row(COUNT, integer(0, MAX_SEQ_LEN), integer(1, MAX_SEQ_LEN)), MAX_ITEMS),
            "wanted": listing(integer(0, MAX_SEQ_LEN), MAX_ITEMS),
            "freed": listing(COUNT, MAX_ITEMS),
        },
        payload=1 << 26,
    ),
    messages.Low: Kind(23, {"step": COUNT, "layer": COUNT, "product": integer(0, 3)}, payload=1 << 26),
    messages.Answer: Kind(24, {"step": COUNT, "layer": COUNT, "product": integer(0, 3)}, payload=1 << 26),
    messages.Leave: Kind(25, {"step": COUNT, "inference_us": BYTES}, payload=1 << 26, must_have_payload=False),
    messages.Pass: Kind(
        26,
        {
            **dict.fromkeys(("epoch", "step"), COUNT),
            **dict.fromkeys(("start", "stop"), row(integer(0, MAX_LAYERS), integer(-1, 3))),
            "passages": listing(row(COUNT, integer(-1, 1 << 32), integer(1, MAX_SEQ_LEN)), MAX_ITEMS),
            "rows": listing(row(COUNT, integer(0, MAX_SEQ_LEN), *(integer(1, MAX_SEQ_LEN),) * 2), MAX_ITEMS),
            **dict.fromkeys(("freed", "ended"), listing(COUNT, MAX_ITEMS)),
        },
        payload=1 << 26,
    ),
    messages.Adapt: Kind(27, {"epoch": COUNT, "number": COUNT, "adapter": optional(mapping(SEEDED))}),
    messages.Adapted: Kind(28, {"epoch": COUNT, "number": COUNT, "problem": optional(text(MAX_TEXT))}),
    messages.Measure: Kind(29, {"epoch": COUNT, "round": COUNT}),
    messages.Measured: Kind(30, {"epoch": COUNT, "round": COUNT, "read_speed": SPEED}),
}
