"""The messages between nodes on the wire: how each becomes frames, and is read.

A message is a header frame, the msgpack list [kind, field, ...], and for some kinds a payload frame of raw bytes. All
that arrives is checked against SCHEMA before anything is made of it; lists in it become tuples.
"""

import reprlib
from collections.abc import Sequence

import msgpack

from dllama import __version__
from dllama.cluster.bounds import MAX_ITEMS, MAX_PLAN_HEADER, MAX_TEXT, PROTOCOL, SCHEMA, Kind
from dllama.cluster.messages import (  # noqa: F401 - whoever talks gets them from here
    Adapt,
    Adapted,
    Answer,
    Beat,
    Bye,
    Candidates,
    Chunk,
    Enter,
    Got,
    Hello,
    Join,
    Joined,
    Leave,
    Loading,
    Lost,
    Low,
    Measure,
    Measured,
    Need,
    NeedAdapters,
    Open,
    Opened,
    Part,
    Pass,
    Plan,
    Probe,
    Ready,
    Refuse,
    Step,
    Welcome,
)
from dllama.errors import DllamaError
from dllama.formats.blocks import FloatType
from dllama.formats.config import Activation, Arch, ModelConfig, RopeType


class WireError(DllamaError):
    """A message that is not one: what is wrong with it."""


KINDS = {kind.number: (message, kind, tuple(kind.fields.values())) for message, kind in SCHEMA.items()}

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


def unchecked(message: tuple) -> bytes:
    """The header of a message that is sent many times a token, and made of numbers that were checked before."""
    return msgpack.packb((SCHEMA[type(message)].number, *message))


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
