"""`dllama cache` on a folder with slices of all kinds."""

import json
import os
import time

import pytest

from dllama.cluster.slice_cache import SliceCache
from tests.cli.program import dllama, fails, succeeds
from tests.cluster.made_slices import CHUNK, SIZE, file_bytes, name_of, put, send, slice_of

DAY = 86400


@pytest.fixture
def home(tmp_path):
    return {"XDG_CACHE_HOME": str(tmp_path)}


@pytest.fixture
def cache(tmp_path):
    """Two slices that are whole, not used for 3 and 40 days, and four tenths of one."""
    cache, now = SliceCache(tmp_path / "dllama" / "slices"), time.time()
    put(cache, 0xA << 124, used=now - 3 * DAY)
    put(cache, 0xB << 124, used=now - 40 * DAY)
    with cache.receive(name_of(0xC << 124), SIZE, CHUNK, "model\x1b[2J.m, heads 0-4") as incoming:
        send(incoming, slice_of(3), range(4))
    return cache


def names(cache) -> str:
    return "".join(sorted(entry.name[0] for entry in cache.entries()))


def test_a_list_for_people(cache, home):
    in_use = cache.find(name_of(0xA << 124), SIZE)
    os.utime(cache.folder / f"{name_of(0xA << 124)}.slice", (time.time() - 3 * DAY,) * 2)
    lines = succeeds("cache", "list", **home).splitlines()
    assert lines[0] == f"{cache.folder}: 3 slices, 313 kB"
    rows = [" ".join(line.split()) for line in lines[2:]]
    assert rows == [
        "slice on disk last used state of",
        "c00000000000 104 kB just now 40 % of 100 kB model\\x1b[2J.m, heads 0-4",
        f"a00000000000 104 kB 3 days ago whole, in use slice {0xA << 124}",
        f"b00000000000 104 kB 40 days ago whole slice {0xB << 124}",
    ]
    del in_use


def test_a_list_as_json(cache, home):
    values = json.loads(succeeds("cache", "list", "--json", **home))
    assert values["folder"] == str(cache.folder)
    *_, last = values["slices"]
    used = last.pop("used")
    assert 39 * DAY < time.time() - used < 41 * DAY
    assert last == {
        "name": name_of(0xB << 124),
        "label": f"slice {0xB << 124}",
        "bytes": SIZE,
        "done_bytes": SIZE,
        "file_bytes": file_bytes(),
        "whole": True,
        "busy": False,
    }
    assert [entry["done_bytes"] for entry in values["slices"]] == [4 * CHUNK, SIZE, SIZE]


def test_a_cache_that_does_not_exist(tmp_path, home):
    folder = tmp_path / "dllama" / "slices"
    assert succeeds("cache", "list", **home) == f"{folder}: 0 slices, 0 bytes\n"
    assert json.loads(succeeds("cache", "list", "--json", **home)) == {"folder": str(folder), "slices": []}
    assert succeeds("cache", "clear", **home) == "0 bytes freed, 0 removed\n"
    assert succeeds("cache", "verify", **home) == ""
    assert not folder.exists()


def test_clearing_some_and_all(cache, home):
    assert succeeds("cache", "clear", "--older-than", "30", **home) == "104 kB freed, 1 removed\n"
    assert names(cache) == "ac"
    assert succeeds("cache", "clear", "c0", **home) == "104 kB freed, 1 removed\n"
    assert names(cache) == "a"
    in_use = cache.find(name_of(0xA << 124), SIZE)
    assert succeeds("cache", "clear", **home) == "0 bytes freed, 0 removed; 1 in use left\n"
    del in_use
    assert succeeds("cache", "clear", **home) == "104 kB freed, 1 removed\n"
    assert names(cache) == ""


def test_verifying(cache, home):
    assert succeeds("cache", "verify", "a", **home) == "a00000000000  sound\n"
    path = cache.folder / f"{name_of(0xB << 124)}.slice"
    data = bytearray(path.read_bytes())
    data[50_000] ^= 1
    path.write_bytes(data)
    result = dllama("cache", "verify", **home)
    assert result.returncode == 1
    assert sorted(result.stdout.splitlines()) == ["a00000000000  sound", "b00000000000  damaged, chunks: 1"]
    assert result.stderr == (
        f"dllama: error: {cache.folder}: slices are damaged; dllama cache clear b00000000000 removes them\n"
    )


def test_what_is_not_there(cache, home):
    for command in ("clear", "verify"):
        assert fails("cache", command, "d", **home) == (
            f"{cache.folder}: no slice d; dllama cache list shows what is there"
        )
    assert names(cache) == "abc"
    assert fails("cache", "clear", "--older-than", "-1", status=2, **home).startswith("Invalid value")
