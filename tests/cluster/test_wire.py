"""Messages there and back, and whatever else may arrive."""

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.cluster import bounds, wire
from dllama.cluster.bounds import PROTOCOL, SCHEMA
from dllama.cluster.wire import WireError, decode, encode
from tests.cluster.models import TINY

ID = bytes(range(16))

PLAN = {
    "config": wire.config_values(TINY),
    "index": 1,
    "shares": (
        ((0, 2), (0, 4), (0, 500), (0, 1)),
        ((2, 4), (4, 8), (500, 1000), (1, 2)),
    ),
    "addresses": ("", "10.0.0.2:9998"),
    "form": "MESH",
    "order": (0, 1),
    "buffer_type": 3,
    "kv_type": 1,
    "context": 128,
    "adapters": ((4,) * 14, (0, 8) * 7),
    "stack": False,
    "step_timeout": 10.0,
    "model_digest": ID,
    "model_name": "small.m",
}

ADAPTER = {
    "r_c2d": 16, "r_d2c": 24, "targets": ("q", "down"), "layers": (0, 3), "fingerprint": "5f" * 32,
    "seed": (1 << 64) - 1,
}  # fmt: skip
SEEDED = {"r_c2d": 16, "r_d2c": 24, "targets": ("q", "down"), "layers": (0, 3), "seed": 7, "worked": (1, 30)}
OPEN = {"model_digest": ID, "layers": (1, 30), "context": 4096, "form": 3}

MESSAGES = (
    wire.Hello(PROTOCOL, "1.0", ID, "root"),
    wire.Welcome(PROTOCOL, "1.0", "shelf", 4, 8 << 30, 4.5e9, "neon", ID),
    wire.Welcome(PROTOCOL, "1.0", "attic", 1, None, None, "portable", None),
    wire.Refuse("a model of dllama 2"),
    wire.Probe(7),
    wire.Plan(1, PLAN),
    wire.Need(1, False),
    wire.Chunk(1, 17, ID),
    wire.Got(1, 17),
    wire.Join(ID, 1, 2),
    wire.Joined(1, 1),
    wire.Loading(1, 10, 20),
    wire.Ready(1, 12.5),
    wire.Step(1, 99, ((0, 17, 1, -1), (3, 0, 12, 1)), (0, 12), (0.8, 40, 0.05, 1e-6, 1.1, (5, 6)), (1, 2)),
    wire.Part(1, 99, 43),
    wire.Candidates(1, 99, (320, 8), 80_000, 3_000, 290_000, 290_000),
    wire.Lost(1, 2, "the connection broke"),
    wire.Beat(),
    wire.Bye(),
    wire.NeedAdapters(1),
    wire.Open({**OPEN, "adapter": None}),
    wire.Open({**OPEN, "adapter": ADAPTER}),
    wire.Opened("cpu, 2 threads"),
    wire.Enter(7, ((1, 0, 12), (2, 5, 1)), (11, 12), (3,)),
    wire.Low(7, 31, 0),
    wire.Answer(7, 31, 3),
    wire.Leave(7, 80_000),
    wire.Pass(1, 100, (0, -1), (3, 1), ((5, 2, 12), (6, -1, 1)), ((1, 0, 12, 4096), (2, 5, 1, 128)), (3,), (4,)),
    wire.Adapt(1, 2, SEEDED),
    wire.Adapt(1, 2, None),
    wire.Adapted(1, 2, None),
    wire.Adapted(1, 2, "not enough memory"),
    wire.Measure(1, 2),
    wire.Measured(1, 2, 4.5e9),
)


def packed(message, number=None):
    """Frames of a message that nobody has checked."""
    kind = SCHEMA[type(message)]
    payload = [b"payload"] if kind.payload else []
    return [msgpack.packb([kind.number if number is None else number, *message]), *payload]


def test_there_is_an_example_of_every_kind():
    assert {type(message) for message in MESSAGES} == set(SCHEMA)
    assert all(tuple(kind.fields) == message._fields for message, kind in SCHEMA.items())
    assert sorted(kind.number for kind in SCHEMA.values()) == list(range(1, len(SCHEMA) + 1))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_message_there_and_back(message):
    payload = [b"payload"] if SCHEMA[type(message)].payload else []
    assert decode(encode(message, *payload)) == (message, payload)


def test_a_payload_stays_where_it_is():
    payload = memoryview(bytearray(100))
    assert encode(wire.Part(1, 2, 3), payload)[1] is payload
    assert decode(encode(wire.Part(1, 2, 3), payload))[1][0] is payload


@pytest.mark.parametrize("message", [m for m in MESSAGES if m], ids=lambda message: type(message).__name__)
@given(data=st.data())
def test_a_field_of_another_type_is_refused_on_both_sides(message, data):
    at = data.draw(st.integers(0, len(message) - 1))
    wrong = data.draw(st.sampled_from((-1, 1 << 63, float("nan"), b"short", "\x1b[2J", [[]], {"a": 1}, [None])))
    damaged = type(message)(*message[:at], wrong, *message[at + 1 :])
    with pytest.raises(WireError, match=f"{type(message).__name__}: {message._fields[at]}: "):
        encode(damaged, *packed(message)[1:])
    with pytest.raises(WireError):
        decode(packed(damaged))


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_a_field_more_or_less_is_refused(message):
    header, *payload = packed(message)
    values = msgpack.unpackb(header)
    with pytest.raises(WireError, match=f"{len(message) + 1} fields, not {len(message)}"):
        decode([msgpack.packb([*values, 0]), *payload])
    if message:
        with pytest.raises(WireError, match=f"{len(message) - 1} fields, not {len(message)}"):
            decode([msgpack.packb(values[:-1]), *payload])


@pytest.mark.parametrize("message", MESSAGES, ids=lambda message: type(message).__name__)
def test_another_number_of_payload_frames_is_refused(message):
    kind = SCHEMA[type(message)]
    with pytest.raises(WireError, match="frames of payload, more than"):
        decode([*packed(message), b"one more"])
    if kind.payload and kind.must_have_payload:
        with pytest.raises(WireError, match="no payload"):
            decode(packed(message)[:1])


def test_large_headers_are_refused_before_they_are_read():
    with pytest.raises(WireError, match="more than any message has"):
        decode([bytes(bounds.MAX_PLAN_HEADER + 1)])
    rows = tuple((1 << 31, 1 << 25, 1, -1) for _ in range(8000))
    with pytest.raises(WireError, match="Step: a header of [0-9]+ bytes, more than 65536"):
        encode(wire.Step(1, 1, rows, (), (0, 1, 0, 0, 1, ()), ()), b"rows")


def test_a_chunk_that_is_too_large_is_refused():
    with pytest.raises(WireError, match="Chunk: a payload of 1048577 bytes, more than 1048576"):
        decode([*packed(wire.Chunk(1, 0, ID))[:1], bytes((1 << 20) + 1)])


OTHERS = [wire.Hello(PROTOCOL + 1, "9.0", ID, "root"), wire.Welcome(0, "0.1", *MESSAGES[1][2:])]


@pytest.mark.parametrize("message", OTHERS)
def test_another_protocol_says_so_whatever_else_it_has(message):
    header, *_ = packed(message)
    for values in (msgpack.unpackb(header), [*msgpack.unpackb(header), "new"]):
        with pytest.raises(WireError, match=f"speaks protocol {message.protocol}, .*same version"):
            decode([msgpack.packb(values)])


@pytest.mark.parametrize(
    "path, value",
    [
        (("config", "dim"), 0),
        (("config", "dim"), 1 << 21),
        (("config", "n_layers"), 1025),
        (("config", "arch"), 3),
        (("config", "norm_epsilon"), float("inf")),
        (("config", "more"), 1),
        (("index",), 256),
        (("shares",), [[[0, 1]] * 4] * 257),
        (("shares",), [[[0, 1]] * 3]),
        (("shares",), [[[1, 0]] * 4]),
        (("shares",), [[[0, 1, 2]] * 4]),
        (("addresses",), ["a" * 4097]),
        (("form",), "RING"),
        (("order",), [0, -1]),
        (("buffer_type",), 2),
        (("kv_type",), 2),
        (("model_name",), "a\nb"),
        (("new",), 1),
    ],
)
def test_a_plan_beyond_its_bounds_is_refused(path, value):
    *outer, last = path
    plan = PLAN | {"config": dict(PLAN["config"])}
    inner = plan[outer[0]] if outer else plan
    inner[last] = value
    with pytest.raises(WireError, match="Plan: plan: "):
        encode(wire.Plan(1, plan))
    with pytest.raises(WireError, match="Plan: plan: "):
        decode(packed(wire.Plan(1, plan)))


def test_a_config_there_and_back():
    (message, _) = decode(encode(wire.Plan(1, PLAN)))
    assert wire.config_of(message.plan["config"]) == TINY
    with pytest.raises(WireError, match="Plan: config: .* cannot be shared"):
        wire.config_of(PLAN["config"] | {"n_heads": 5, "n_kv_heads": 3})


@given(st.text())
def test_any_text_can_be_made_a_line(words):
    message = wire.Refuse(wire.line(words))
    assert decode(encode(message)) == (message, [])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(1 << 63), (1 << 64) - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text() | st.binary() | st.integers(-9, 9), inner),
    max_leaves=20,
)


def refused_or_sound(frames):
    """Whatever comes in, nothing but WireError comes out; what is let through is a message as it could be sent."""
    try:
        message, payload = decode(frames)
    except WireError as error:
        assert len(str(error).splitlines()) == 1
    else:
        assert decode(encode(message, *payload)) == (message, payload)


@given(st.lists(st.binary(max_size=200), max_size=4))
def test_random_bytes(frames):
    refused_or_sound(frames)


@given(st.integers(0, len(SCHEMA) + 1), st.lists(JSON, max_size=9), st.lists(st.binary(max_size=9), max_size=2))
def test_sound_msgpack_of_random_values(kind, fields, payload):
    refused_or_sound([msgpack.packb([kind, *fields]), *payload])


@given(st.sampled_from(MESSAGES), st.data())
def test_a_sound_message_with_damage(message, data):
    header, *payload = packed(message)
    damaged = bytearray(header)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    refused_or_sound([bytes(damaged[: data.draw(st.integers(0, len(damaged)))]), *payload])
    refused_or_sound([bytes(damaged), *payload])


@pytest.mark.parametrize(
    "header",
    [
        b"",
        b"\xc1",
        b"\x90",
        b"\xc0",
        b"\xdd\xff\xff\xff\xff",  # a list of 4 billion
        b"\xdf\xff\xff\xff\xff",  # a dict of as many
        b"\xc6\xff\xff\xff\xff",  # as many bytes
        b"\x91" * 60_000 + b"\xc0",  # lists within lists
        b"\x92\x01\xd6\xff\x00\x00\x00\x00",  # a time stamp
        b"\x92\x01\xd4\x05\x00",  # an extension
        b"\x92\x05\x81\x90\x01",  # a dict with a list for a key
        b"\x92\x03\xa2\xff\xfe",  # text that is not UTF-8
        b"\x91\x11\x00",  # more after the end
    ],
)
def test_headers_made_to_hurt(header):
    with pytest.raises(WireError):
        decode([header])
