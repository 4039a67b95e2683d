"""The page about the protocol says what the code does, and the map of the package has every file."""

import re
from pathlib import Path

from dllama import cluster
from dllama.cluster import bounds, crew, join, links, mesh, recruit, settings, sockets, supply, wire
from dllama.engine import workspace
from tests.cluster.models import TINY

PAGE = Path(cluster.__file__).with_name("README.md").read_text(encoding="utf-8")
MESSAGE = re.compile(r"^ ?(\d+) (\w+) +\w+ -> \w+(.*(?:\n {33}.*)*)", re.MULTILINE)
FIELD = re.compile(r"(\w+): ([^,+]+)")
TYPES = {"count": bounds.COUNT, "size": bounds.BYTES, "node": bounds.INDEX, "16 bytes": bounds.DIGEST}


def documented() -> dict[str, tuple[int, str]]:
    """Number and content of each message on the page."""
    return {name: (int(number), content) for number, name, content in MESSAGE.findall(PAGE)}


def test_every_message_is_there():
    assert {name: number for name, (number, _) in documented().items()} == {
        message.__name__: kind.number for message, kind in bounds.SCHEMA.items()
    }


def test_the_fields_of_each_message():
    for message, kind in bounds.SCHEMA.items():
        fields = {name: written.strip() for name, written in FIELD.findall(documented()[message.__name__][1])}
        assert list(fields) == list(kind.fields), message
        for name, written in fields.items():
            assert kind.fields[name] is TYPES.get(written, kind.fields[name]), (message, name)


def test_the_protocol():
    assert re.findall(r"protocol: (\d+)", PAGE) == [str(bounds.PROTOCOL)] * 2


def test_which_messages_have_a_payload():
    with_payload = {name for name, (_, content) in documented().items() if "+ " in content}
    assert with_payload == {message.__name__ for message, kind in bounds.SCHEMA.items() if kind.payload}


def test_the_map_of_a_plan():
    block = PAGE.partition("\nconfig  ")[2].partition("\n```")[0]
    assert ["config", *re.findall(r"^(\w+)", block, re.MULTILINE)] == list(bounds.PLAN)
    config = block.partition("map: ")[2].partition(";")[0]
    assert re.findall(r"\w+", config) == list(wire.config_values(TINY))


def test_times_and_sizes():
    step = settings.STEP_TIMEOUT
    for words in (
        f"a ping every {sockets.HEARTBEAT_MS / 1000:g} s, and {sockets.SILENCE_MS / 1000:g} s of silence",
        f"A frame of more than {links.MAX_MESSAGE_BYTES >> 20} MiB",
        f"{recruit.PROBES} of 1 byte, {recruit.PROBES} of {recruit.PROBE_BYTES >> 10} KiB",
        f"at most {supply.WINDOW} without their Got",
        f"{workspace.MAX_ROWS} rows at most",
        f"up to {mesh.EARLY} messages",
        f"to all others every {mesh.BEAT_SECONDS:g} s",
        f"for {mesh.SILENT_SECONDS:g} s",
        f"| heartbeats | at most {(sockets.HEARTBEAT_MS + sockets.SILENCE_MS) / 1000:g} s |",
        f"| {crew.WORKERS_PATIENCE * step:g} s, the root {step:g} s (`--step-timeout`) |",
        f"| the root | {supply.SILENCE_SECONDS:g} s |",
        f"| both | {join.JOIN_SECONDS:g} s |",
        f"| the listener | {sockets.HANDSHAKE_MS / 1000:g} s |",
    ):
        assert words in PAGE


def test_every_file_is_on_the_map():
    files = {path.stem for path in Path(cluster.__file__).parent.glob("*.py")} - {"__init__"}
    assert files <= set(re.findall(r"\w+", cluster.__doc__))
