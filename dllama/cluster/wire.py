"""The messages between nodes on the wire: the bounds of each, and how it becomes frames.

A message is a header frame, the msgpack list [kind, field, ...], and for some kinds a payload frame of raw bytes. All
that arrives is checked against SCHEMA before anything is made of it; lists in it become tuples.
"""

import reprlib
from collections.abc import Sequence
from typing import NamedTuple

import msgpack

from dllama import __version__
from dllama.cluster.messages import (
    Beat,
    Bye,
    Candidates,
    Chunk,
    Got,
    Hello,
    Join,
    Joined,
    Loading,
    Lost,
    Need,
    NeedAdapters,
    Part,
    Plan,
    Probe,
    Ready,
    Refuse,
    Step,
    Welcome,
)
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
from dllama.cluster.traffic import Form
from dllama.engine.candidates import MAX_RECENT
from dllama.errors import DllamaError
from dllama.formats.blocks import FloatType
from dllama.formats.config import MAX_DIM, MAX_EXPERTS, MAX_SEQ_LEN, MAX_VOCAB, Activation, Arch, ModelConfig, RopeType
from dllama.privatelora.shape import MAX_RANK
from dllama.targets import TARGETS

PROTOCOL = 2
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


class WireError(DllamaError):
    """A message that is not one: what is wrong with it."""


COUNT = integer(0, 1 << 32)
BYTES = integer(0, 1 << 50)
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
    "buffer_type": one_of(FloatType.F32, FloatType.Q80),
    "kv_type": one_of(FloatType.F32, FloatType.F16, FloatType.Q80),
    "context": integer(1, MAX_SEQ_LEN),
    "adapters": listing(listing(integer(0, MAX_RANK), MAX_LAYERS * len(TARGETS)), MAX_ADAPTERS),
    "step_timeout": real(1e-3, 1e6),  # seconds until a node that does not answer counts as lost
    "model_digest": DIGEST,
    "model_name": text(255),  # for people
}
"""Keys of the plan that a worker gets. Shares are [heads, ffn_blocks, vocab, sum_blocks], one for each node; of each
adapter the plan has the rank in each layer for each target."""


class Kind(NamedTuple):
    """One kind of message: its number, its fields' checkers in order, and its payload."""

    number: int
    fields: dict[str, Checker]
    payload: int = 0  # the most bytes of its payload; 0: it has none
    must_have_payload: bool = True
    header: int = MAX_HEADER  # the most bytes of its header


SCHEMA: dict[type, Kind] = {
    Hello: Kind(
        1, {"protocol": integer(PROTOCOL, PROTOCOL), "version": text(64), "session": DIGEST, "role": one_of("root")}
    ),
    Welcome: Kind(
        2,
        {
            "protocol": integer(PROTOCOL, PROTOCOL),
            "version": text(64),
            "name": text(255),
            "threads": integer(1, 1 << 12),
            "free_memory": optional(BYTES),
            "read_speed": optional(real(1, 1e15)),
            "kernels": text(64),
            "model_digest": optional(DIGEST),
        },
    ),
    Refuse: Kind(3, {"reason": text(MAX_TEXT)}),
    Probe: Kind(4, {"number": COUNT}, payload=1 << 26, must_have_payload=False),
    Plan: Kind(5, {"epoch": COUNT, "plan": mapping(PLAN)}, header=MAX_PLAN_HEADER),
    Need: Kind(6, {"epoch": COUNT, "has_all": boolean}, payload=1 << 26, must_have_payload=False),
    Chunk: Kind(7, {"epoch": COUNT, "index": COUNT, "digest": DIGEST}, payload=MAX_CHUNK),
    Got: Kind(8, {"epoch": COUNT, "index": COUNT}),
    Join: Kind(9, {"session": DIGEST, "epoch": COUNT, "index": INDEX}),
    Joined: Kind(10, {"epoch": COUNT, "index": INDEX}),
    Loading: Kind(11, {"epoch": COUNT, "done": BYTES, "total": BYTES}),
    Ready: Kind(12, {"epoch": COUNT, "load_ms": real(0, 1e12)}),
    Step: Kind(
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
    Part: Kind(14, {"epoch": COUNT, "step": COUNT, "round": COUNT}, payload=1 << 31),
    Candidates: Kind(
        15,
        {
            **dict.fromkeys(("epoch", "step"), COUNT),
            "sizes": listing(COUNT, MAX_ITEMS),
            **dict.fromkeys(("inference_us", "transfer_us", "sent", "received"), BYTES),
        },
        payload=1 << 31,
        must_have_payload=False,
    ),
    Lost: Kind(16, {"epoch": COUNT, "index": INDEX, "reason": text(MAX_TEXT)}),
    Beat: Kind(17, {}),
    Bye: Kind(18, {}),
    NeedAdapters: Kind(19, {"epoch": COUNT}),
}

KINDS = {kind.number: (message, kind, tuple(kind.fields.values())) for message, kind in SCHEMA.items()}

PART = SCHEMA[Part].number

VERSIONED = (Hello, Welcome)
"""Messages whose first field is the protocol, in every version."""

LIMITS = {
    "max_array_len": MAX_ITEMS,
    "max_map_len": 64,
    "max_str_len": 4 * MAX_TEXT,  # in bytes of UTF-8
    "max_bin_len": MAX_TEXT,
    "max_ext_len": 0,
}


def encode(message: tuple, *payload) -> list:
    """The frames of a message: its header, and what it carries as it is.

    message: of one of the classes of ``messages``;  payload: bytes-like, at most one
    Raises WireError for what the receiver would refuse.
    """
    kind = SCHEMA[type(message)]
    for (name, checker), value in zip(kind.fields.items(), message, strict=True):
        wrong = checker(value)
        if wrong:
            raise WireError(f"{type(message).__name__}: {name}: {wrong}")
    header = msgpack.packb((kind.number, *message))
    _check_sizes(type(message), kind, len(header), payload)
    return [header, *payload]


def part_header(epoch: int, step: int, round: int) -> bytes:
    """The header of a Part, which is sent a hundred times a token: `encode` without its checks."""
    return msgpack.packb((PART, epoch, step, round))


def decode(frames: Sequence) -> tuple[tuple, Sequence]:
    """The message in these frames (bytes or memoryviews), and its payload frames: none or one. Raises WireError."""
    if not frames:
        raise WireError("a message without frames")
    number, *values = _header(frames[0])
    if type(number) is not int or number not in KINDS:
        raise WireError(f"a message of unknown kind {reprlib.repr(number)}")
    message, kind, checkers = KINDS[number]
    if message in VERSIONED and values and type(values[0]) is int and values[0] != PROTOCOL:
        raise WireError(
            f"a node that speaks protocol {values[0]}, and this is dllama {__version__} with protocol {PROTOCOL}: "
            "all nodes need the same version"
        )
    if len(values) != len(checkers):
        raise WireError(f"{message.__name__}: {len(values)} fields, not {len(checkers)}")
    for i, checker in enumerate(checkers):
        wrong = checker(values[i])
        if wrong:
            raise WireError(f"{message.__name__}: {message._fields[i]}: {wrong}")
    payload = frames[1:]
    _check_sizes(message, kind, len(frames[0]), payload)
    return message(*values), payload


def line(words: str) -> str:
    """Any text as a message may carry it: on one line, unprintable characters replaced, cut at MAX_TEXT."""
    words = " ".join(words.split())
    return "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)[:MAX_TEXT]


def config_values(config: ModelConfig) -> dict:
    """A config as the plan carries it."""
    return {name: value + 0 for name, value in vars(config).items()}  # + 0: of an enum's member, its value


def config_of(values: dict) -> ModelConfig:
    """The config that a plan carries. Raises WireError for a shape that cannot exist."""
    enums = {"arch": Arch, "rope_type": RopeType, "weight_type": FloatType, "activation": Activation}
    try:
        return ModelConfig(**(values | {name: enum(values[name]) for name, enum in enums.items()}))
    except ValueError as error:
        raise WireError(f"Plan: config: {error}") from None


def _header(frame) -> tuple:
    if len(frame) > MAX_PLAN_HEADER:
        raise WireError(f"a header of {len(frame)} bytes, more than any message has")
    try:
        values = msgpack.unpackb(frame, use_list=False, raw=False, strict_map_key=True, **LIMITS)
    except (ValueError, msgpack.UnpackException) as error:
        raise WireError(f"a header that is not msgpack: {error}") from None
    if type(values) is not tuple or not values:
        raise WireError(f"a header that is no list: {reprlib.repr(values)}")
    return values


def _check_sizes(message: type, kind: Kind, header: int, payload: Sequence) -> None:
    if header > kind.header:
        raise WireError(f"{message.__name__}: a header of {header} bytes, more than {kind.header}")
    if len(payload) > (kind.payload > 0):
        raise WireError(f"{message.__name__}: {len(payload)} frames of payload, more than it may have")
    if kind.payload and not payload and kind.must_have_payload:
        raise WireError(f"{message.__name__}: no payload")
    if payload and memoryview(payload[0]).nbytes > kind.payload:
        nbytes = memoryview(payload[0]).nbytes
        raise WireError(f"{message.__name__}: a payload of {nbytes} bytes, more than {kind.payload}")
