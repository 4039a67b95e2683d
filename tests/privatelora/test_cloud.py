"""A live cloud's port: whom it serves, what it refuses, and that nothing that arrives there ends it."""

import socket
from contextlib import suppress

import msgpack
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dllama.cluster import bounds, wire
from dllama.cluster.links import Link
from dllama.cluster.root import ClusterEngine
from dllama.cluster.settings import ClusterSettings
from dllama.errors import ClusterError
from dllama.formats import FloatType
from dllama.kernels.team import Team
from dllama.privatelora.frozen_weights import MOST_ADAPTERS
from dllama.privatelora.session import MOST_SEQUENCES
from tests.cluster.processes import Process, eventually
from tests.cluster.test_wire import MESSAGES, packed
from tests.privatelora.fake_edge import HELLO, FakeEdge, floats
from tests.privatelora.nodes import edge, endless_edge, run
from tests.privatelora.served import MAX_EDGES, TOKENS, is_free

live = settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
"""One cloud meets all examples of a test."""


# --- who comes ---


def test_an_edge_of_another_version(fake):
    one = fake()
    one.say(HELLO._replace(version="0.0.1"))
    assert "and the edge 0.0.1: install the same on both" in one.refused()


def test_a_node_of_another_protocol(fake):
    one = fake()
    one.say(HELLO._replace(protocol=wire.PROTOCOL + 1))
    assert f"speaks protocol {wire.PROTOCOL + 1}" in one.refused()


def test_a_root_is_told_that_this_is_a_cloud(served, cloud):
    _, model, _, _, _ = served
    team = Team(1)
    types = FloatType.F32, FloatType.F32
    with pytest.raises(ClusterError, match=r"^[^\n]*this worker serves edges \(it was started with --device\)[^\n]*$"):
        settings = ClusterSettings((cloud.address,), None, (1, 1))
        ClusterEngine(model, team, 64, *types, settings, [], lambda line: None, lambda *_: None)
    team.close()


def test_more_edges_than_it_takes(fake, served, cloud):
    _, model, folder, _, _ = served
    edges = [fake() for _ in range(MAX_EDGES)]
    for one in edges:
        one.open()
    with pytest.raises(ClusterError, match="this cloud is busy with 3 edges, as many as it takes; try again later"):
        with edge(model, cloud.address, adapter=folder):
            pass
    for number, one in enumerate(edges):
        assert type(one.step()) is wire.Leave, f"edge {number} is served as before"
    edges[0].say(wire.Bye())
    assert edges[0].hear(wire.Bye) == wire.Bye()
    with edge(model, cloud.address, adapter=folder) as engine:
        run(engine, TOKENS)


def test_a_flood_of_edges(fake, cloud):
    edges = [fake() for _ in range(60)]
    for one in edges:
        one.say(HELLO)
    answers = [type(one.hear(wire.Welcome, wire.Refuse)) for one in edges]
    assert answers.count(wire.Welcome) == MAX_EDGES and answers.count(wire.Refuse) == 60 - MAX_EDGES
    for one in edges:
        one.say(wire.Bye())
        assert one.hear(wire.Bye) == wire.Bye()


def test_an_edge_that_says_hello_and_nothing_more(fake):
    one = fake()
    one.greet()
    assert one.refused() == "it asked for nothing"


# --- what they ask for ---


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"model_digest": bytes(16)}, "this cloud has another model, model.m"),
        ({"layers": (0, 3)}, "layers 0 to 3 of a model of 2"),
        ({"layers": (1, 1)}, "layers 1 to 1 of a model of 2"),
        ({"context": 301}, "a context of 301 tokens, and the model has 300"),
    ],
)
def test_sessions_that_the_model_does_not_have(fake, changes, said):
    one = fake(False)
    one.greet()
    one.say(wire.Open(one.session | changes))
    assert one.refused() == said


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"fingerprint": "x"}, "the adapter's fingerprint is not that of its seed and ranks with the cloud's model"),
        ({"r_c2d": 7}, "the adapter's fingerprint is not that of its seed and ranks with the cloud's model"),
        ({"seed": 8}, "the adapter's fingerprint is not that of its seed and ranks with the cloud's model"),
        ({"seed": None, "fingerprint": "x"}, "this cloud has not the A and B of that adapter: start its worker with"),
        ({"layers": (0, 5)}, "the adapter makes no sense: its layers are not those of a model of 2"),
        ({"layers": (1, 0)}, "the adapter makes no sense: its layers do not ascend"),
        ({"layers": ()}, "the adapter makes no sense: no target, or no layer"),
        ({"targets": ("v", "q")}, "the adapter makes no sense: its targets are v, q"),
        ({"targets": ("q", "q")}, "the adapter makes no sense: q is"),
    ],
)
def test_adapters_that_make_no_sense(fake, changes, said):
    one = fake()
    one.greet()
    one.say(wire.Open(one.session | {"adapter": one.session["adapter"] | changes}))
    assert one.refused().startswith(said)


def test_a_session_before_hello_and_a_second_one(fake):
    one = fake()
    one.say(wire.Open(one.session))
    assert one.refused() == "Open: nothing that this cloud waits for"
    one.open()
    one.say(wire.Open(one.session))
    assert one.refused() == "Open: nothing that this cloud waits for"


def test_a_step_before_the_session(fake):
    one = fake()
    one.greet()
    one.enter()
    assert one.refused() == "Enter: nothing that this cloud waits for"


# --- what they send ---


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(fake, value):
    one = fake()
    one.open()
    one.enter(payload=floats(one.config.dim, value))
    assert one.refused() == "what enters the layers: a value that is infinite or no number"
    one.open()
    one.enter()
    low = one.hear(wire.Low)
    one.answer(low, floats(one.answer_bytes(low.product) // 4, value))
    assert one.refused() == "the answer of layer 0: a value that is infinite or no number"


@pytest.mark.parametrize("form", [FloatType.F16, FloatType.Q80])
def test_scales_and_halves_that_are_none(fake, form):
    one = fake(False)
    one.open(form=int(form))
    row = np.full(form.row_bytes(96), 0x7C, np.uint8)  # of every second byte: exponents of nothing but ones
    one.enter(payload=row.tobytes())
    assert one.refused() == "what enters the layers: a value that is infinite or no number"


@pytest.mark.parametrize("change", [-1, 1, -4, 4, 1000])
def test_payloads_of_another_size(fake, change):
    one = fake()
    one.open()
    right = 4 * one.config.dim
    one.enter(payload=bytes(right + change))
    assert one.refused() == f"what enters the layers: {right + change} bytes for 1 rows of {right} bytes"
    one.open()
    one.enter(rows=((0, 0, 3),))
    low = one.hear(wire.Low)
    right = one.answer_bytes(low.product)
    one.answer(low, bytes(3 * right + change))
    assert one.refused() == f"the answer of layer 0: {3 * right + change} bytes for 3 rows of {right} bytes"


def test_messages_without_what_they_carry(fake):
    one = fake()
    one.open()
    one.say(wire.Enter(1, ((0, 0, 1),), (0,), ()))
    assert one.refused() == "Enter: no payload"


def test_an_answer_that_nobody_waits_for(fake):
    one = fake()
    one.open()
    one.say(wire.Answer(1, 0, 0), bytes(one.answer_bytes(0)))
    assert one.refused() == "an answer that nobody waits for"


def test_two_answers_for_one(fake, cloud):
    """The second comes while the cloud is at work, with the edge's next stop not reached yet."""
    one = fake()
    one.open()
    one.enter()
    low = one.hear(wire.Low)
    one.answer(low)
    one.answer(low)
    assert one.hear(wire.Refuse).reason in ("an answer that nobody waits for", "an answer to something else")


@pytest.mark.parametrize("change", [{"step": 2}, {"layer": 1}, {"product": 3}, {"product": 1}, {"layer": 1 << 32}])
def test_an_answer_to_something_else(fake, change):
    one = fake()
    one.open()
    one.enter()
    low = one.hear(wire.Low)
    one.say(wire.Answer(*low._replace(**change)), bytes(one.answer_bytes(low.product)))
    assert one.refused() == "an answer to something else"


def test_a_step_before_the_last_one_has_ended(fake):
    one = fake()
    one.open()
    one.enter(1)
    one.hear(wire.Low)
    one.enter(2)
    assert one.refused() == "a step before the last one has ended"


@pytest.mark.parametrize(
    "entering, said",
    [
        ({"rows": ((0, 300, 1),)}, "position 300 is outside the context of 300 tokens"),
        ({"rows": ((0, 299, 2),)}, "position 300 is outside the context of 300 tokens"),
        ({"rows": ((0, 0, 1), (1, 1 << 26, 1))}, f"position {1 << 26} is outside the context of 300 tokens"),
        ({"rows": ()}, "a step of 0 rows, of 1 to 1024, or wanted rows that it has not"),
        ({"rows": ((0, 0, 1025),)}, "a step of 1025 rows, of 1 to 1024, or wanted rows that it has not"),
        ({"rows": ((0, 0, 1000), (1, 0, 25))}, "a step of 1025 rows, of 1 to 1024, or wanted rows that it has not"),
        ({"rows": ((0, 0, 1 << 26),), "payload": b"x"}, "a step of 67108864 rows, of 1 to 1024, or wanted rows that"),
        ({"wanted": (1,)}, "a step of 1 rows, of 1 to 1024, or wanted rows that it has not"),
        ({"wanted": (0,) * 16384}, "a step of 1 rows, of 1 to 1024, or wanted rows that it has not"),
        ({"rows": ((0, 0, 0),)}, "Enter: rows: 0 is no whole number from 1 to"),
        ({"wanted": (-1,)}, "Enter: wanted: -1 is no whole number from 0 to"),
        ({"freed": (1.0,)}, "Enter: freed: 1.0 is no whole number"),
    ],
)
def test_steps_that_make_no_sense(fake, entering, said):
    one = fake()
    one.open()
    one.enter(**entering)
    assert one.refused().startswith(said)


def test_sequences_without_end(fake, cloud):
    one = fake(False)
    one.open(context=2)
    for step in range(MOST_SEQUENCES // 128):
        assert type(one.step(step, rows=tuple((128 * step + i, 0, 1) for i in range(128)))) is wire.Leave
    assert type(one.step(8, rows=((5, 1, 1),))) is wire.Leave, "one that is there already"
    assert type(one.step(9, rows=((999, 0, 1),), freed=(7, 12345))) is wire.Leave, "one for one that was freed"
    eventually(lambda: len(cloud.backend.caches) == MOST_SEQUENCES)
    one.enter(10, rows=((1000, 0, 1),))
    assert one.refused() == f"more than {MOST_SEQUENCES} sequences"


def test_too_little_memory_for_another_sequence(fake, cloud, monkeypatch):
    monkeypatch.setattr(cloud.backend, "free_bytes", lambda: 1000)
    one = fake()
    one.open()
    one.enter()
    assert one.refused().startswith("not enough memory in the cloud: ")


def test_memory_that_others_may_still_take(fake, cloud, monkeypatch):
    """Sequences of all sessions count as full, before any of them is."""
    each = cloud.backend.sequence_bytes(100)
    monkeypatch.setattr("dllama.privatelora.backends.cpu.available_bytes", lambda: 5 * each // 2)
    one, other = fake(), fake()
    one.open(context=100)
    other.open(context=100)
    assert type(one.step(1, rows=((1, 0, 1),))) is wire.Leave
    assert type(other.step(1, rows=((1, 0, 1),))) is wire.Leave
    assert type(other.step(2, rows=((2, 0, 1),), freed=(1,))) is wire.Leave, "what is freed counts no more"
    one.enter(2, rows=((2, 0, 1),))
    assert one.refused().startswith("not enough memory in the cloud: ")
    assert type(other.step(3, rows=((2, 1, 1),))) is wire.Leave, "the other goes on"


def test_memory_that_is_in_use_counts_once(fake, cloud, monkeypatch):
    """What a sequence has written is missing in what the system says is free."""
    one = fake(False)
    one.open(context=100)
    monkeypatch.setattr("dllama.privatelora.backends.cpu.available_bytes", lambda: 10**9)
    assert type(one.step(1, rows=((1, 0, 1),))) is wire.Leave
    assert cloud.backend.free_bytes() == 10**9 - cloud.backend.sequence_bytes(99)
    for step, rows in enumerate([((1, 1, 60),), ((1, 0, 5),)]):
        assert type(one.step(step, rows=rows)) is wire.Leave
        assert cloud.backend.free_bytes() == 10**9 - cloud.backend.sequence_bytes(39)


def test_adapters_without_end(fake, cloud):
    memory = cloud.backend._frozen._memory
    memory[1:] = [np.empty(0)] * (MOST_ADAPTERS - 1)
    try:
        first, second = fake(), fake()
        first.open()
        second.open()  # shares it
        other = fake()
        other.greet()
        other.say(wire.Open(other.session | {"layers": (1, 2)}))
        assert other.refused() == f"the cloud has {MOST_ADAPTERS} adapters already, and room for no more"
    finally:
        memory[1:] = [None] * (MOST_ADAPTERS - 1)


def test_an_edge_that_stops_answering_in_mid_layer(fake):
    one, other = fake(), fake()
    one.open()
    one.enter()
    assert one.hear(wire.Low)
    other.open()
    assert type(other.step()) is wire.Leave, "nobody waits for it"
    assert one.refused() == "no answer for 2 s"


def test_an_edge_that_is_refused_may_come_again(fake):
    one = fake()
    for step in range(3):
        one.open()
        one.enter(step, payload=b"x")
        one.refused()
    one.open()
    assert type(one.step()) is wire.Leave


# --- what is no edge at all ---


NOISE = [b"", b"\0", b"GET / HTTP/1.1\r\nHost: cloud\r\n\r\n", b"\xff" + bytes(8) + b"\x7f", bytes(range(256)) * 999]


@pytest.mark.parametrize("noise", NOISE)
def test_other_programs(cloud, noise):
    with socket.create_connection(cloud.address.split(":")) as connection, suppress(OSError):  # it is dropped
        connection.sendall(noise)
        connection.shutdown(socket.SHUT_WR)


GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL" + bytes(48)


@live
@given(noise=st.binary(max_size=300), greeting=st.sampled_from((b"", GREETING[:10], GREETING)))
def test_random_bytes(cloud, noise, greeting):
    with socket.create_connection(cloud.address.split(":")) as connection, suppress(OSError):
        connection.sendall(greeting + noise)


@live
@given(frames=st.lists(st.binary(max_size=60), min_size=1, max_size=4))
def test_random_frames(cloud, frames):
    with Link(cloud.address, None) as link:
        link.send(frames)
        link.receive(20)


@live
@given(data=st.data())
def test_damaged_messages(served, cloud, data):
    """From strangers, from those that have a session, and in the middle of a step."""
    _, model, _, half, _ = served
    with FakeEdge(cloud.address, model, half) as one:
        if data.draw(st.booleans()):
            one.say(HELLO)
            one.say(wire.Open(one.session))
            if type(one.hear(wire.Opened, wire.Refuse)) is wire.Opened and data.draw(st.booleans()):
                one.enter()
        for _ in range(3):
            header, *payload = packed(data.draw(st.sampled_from(MESSAGES)))
            header = bytearray(header)
            for _ in range(data.draw(st.integers(0, 3))):
                header[data.draw(st.integers(0, len(header) - 1))] = data.draw(st.integers(0, 255))
            one.link.send([bytes(header), *payload])
        one.hear(wire.Refuse, seconds=0.02)


NUMBERS = st.one_of(st.integers(-1, 5), st.integers(0, 1 << 33))


@live
@given(data=st.data())
def test_sessions_at_random(served, cloud, data):
    """Whatever is asked for: it is refused, or steps are served."""
    _, model, _, half, _ = served
    with FakeEdge(cloud.address, model, half) as one:
        wanted = one.session | {"adapter": dict(one.session["adapter"])}
        values = st.one_of(NUMBERS, st.none(), st.text(max_size=3), st.tuples(NUMBERS, NUMBERS))
        for _ in range(data.draw(st.integers(1, 2))):
            place = data.draw(st.sampled_from([wanted, wanted["adapter"]]))
            place[data.draw(st.sampled_from(sorted(place)))] = data.draw(values)
            if type(wanted["adapter"]) is not dict:
                break
        one.say(HELLO)
        one.link.send([msgpack.packb([bounds.SCHEMA[wire.Open].number, wanted])])
        answer = one.hear(wire.Opened, wire.Refuse)
        assert answer is not None
        if type(answer) is wire.Opened:
            one.enter()
            assert one.hear(wire.Low, wire.Leave, wire.Refuse) is not None


PLACES = st.one_of(st.integers(0, 9), st.integers(0, 1 << 26))


@live
@given(data=st.data())
def test_steps_at_random(served, cloud, data):
    """Whatever the step: it is refused, or it is one, and comes to its end."""
    _, model, _, half, _ = served
    with FakeEdge(cloud.address, model, half) as one:
        one.open()
        runs = st.tuples(PLACES, PLACES, st.one_of(st.integers(1, 4), st.integers(1, 1 << 26)))
        rows = data.draw(st.lists(runs, max_size=4))
        count = sum(run[2] for run in rows)
        payload = data.draw(st.one_of(st.binary(max_size=500), st.just(bytes(320 * count if count <= 128 else 0))))
        wanted, freed = (data.draw(st.lists(PLACES, max_size=4)) for _ in range(2))
        assert type(one.step(1, rows=rows, wanted=wanted, freed=freed, payload=payload)) in (wire.Leave, wire.Refuse)


# --- those that go ---


@pytest.mark.parametrize("moment", ["greeted", "asked", "opened", "entered", "answered"])
def test_an_edge_that_goes(served, cloud, moment):
    """What it had is freed whenever it goes; see ``cloud``."""
    _, model, _, half, _ = served
    since = len(cloud.lines)
    with FakeEdge(cloud.address, model, half) as one:
        one.greet()
        if moment == "asked":
            one.say(wire.Open(one.session))
        elif moment != "greeted":
            one.open()
            if moment != "opened":
                one.enter()
                low = one.hear(wire.Low)
                if moment == "answered":
                    one.answer(low)
    cloud.said("the connection broke", since)


def test_an_edge_that_is_killed(served, cloud):
    _, model, folder, _, _ = served
    since = len(cloud.lines)
    with Process(endless_edge, str(model.path), str(folder), cloud.address) as process:
        process.said("position 3")
        assert len(cloud.backend.adapters) == len(cloud.backend.caches) == 1
        process.kill()
        cloud.said("the connection broke", since)
        is_free(cloud)
