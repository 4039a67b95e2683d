"""A slice that arrives in a file: what breaks off goes on, and what is damaged comes again."""

import os
import resource

import numpy as np
import pytest

from dllama.cluster import slice_file
from dllama.cluster.slice_cache import SliceCache
from dllama.cluster.slice_file import HEADER_BYTES, About
from dllama.cluster.transfer import chunk_digest
from dllama.errors import ClusterError
from tests.cluster.made_slices import CHUNK, SIZE, name_of, put, send, slice_of


def test_an_empty_slice(cache):
    with cache.receive(name_of(1), 0, CHUNK, "nothing") as incoming:
        assert incoming.finish().shape == (0,)
    assert cache.find(name_of(1), 0).shape == (0,)


def test_the_label_may_be_any_text(cache):
    with cache.receive(name_of(1), SIZE, CHUNK, "\N{GRINNING FACE}" * 1000):
        (entry,) = cache.entries()
    assert entry.label == "\N{GRINNING FACE}" * 200


def test_a_transfer_goes_on_after_a_break(cache, monkeypatch):
    monkeypatch.setattr(slice_file, "FLUSH_BYTES", 2 * CHUNK)
    data = slice_of(1)
    with cache.receive(name_of(1), SIZE, CHUNK, "a") as incoming:
        send(incoming, data, [0, 5, 9])
    done = []
    with cache.receive(name_of(1), SIZE, CHUNK, "a", lambda *figures: done.append(figures)) as incoming:
        assert done == [(CHUNK, SIZE), (6 * CHUNK, SIZE), (SIZE, SIZE)]
        expected = [chunk_digest(data[i * CHUNK : (i + 1) * CHUNK]) if i in (0, 5, 9) else b"" for i in range(10)]
        assert incoming.held == expected
        assert incoming.done_bytes == 3 * CHUNK - 77
        send(incoming, data)
        np.testing.assert_array_equal(incoming.finish(), data)
    assert [entry.whole for entry in cache.entries()] == [True]


def _receive_some(ours, folder) -> None:
    incoming = SliceCache(folder).receive(name_of(1), SIZE, CHUNK, "a")
    send(incoming, slice_of(1), range(6))
    ours.send("six")
    ours.recv()  # for ever


def test_a_transfer_goes_on_after_its_process_was_killed(cache, process):
    receiver, words = process(_receive_some)
    assert words.recv() == "six"
    receiver.kill()
    receiver.join()
    with cache.receive(name_of(1), SIZE, CHUNK, "a") as incoming:
        assert [bool(digest) for digest in incoming.held] == 6 * [True] + 4 * [False]
        send(incoming, slice_of(1))
        np.testing.assert_array_equal(incoming.finish(), slice_of(1))


def test_damaged_chunks_of_a_broken_transfer_come_again(cache):
    data = slice_of(1)
    with cache.receive(name_of(1), SIZE, CHUNK, "a") as incoming:
        send(incoming, data, range(8))
    with open(cache.folder / f"{name_of(1)}.part", "r+b") as file:
        file.seek(HEADER_BYTES + 2 * CHUNK + 5)  # a byte of a chunk
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))
        file.seek(HEADER_BYTES + SIZE + 16 * 6)  # a digest
        file.write(b"nonsense")
    with cache.receive(name_of(1), SIZE, CHUNK, "a") as incoming:
        assert [i for i, digest in enumerate(incoming.held) if not digest] == [2, 6, 8, 9]
        send(incoming, data)
        np.testing.assert_array_equal(incoming.finish(), data)


@pytest.mark.parametrize("damage", ["header", "short", "long", "other size", "other chunks"])
def test_a_broken_transfer_of_no_use_starts_again(cache, damage):
    with cache.receive(name_of(1), SIZE, CHUNK, "a") as incoming:
        send(incoming, slice_of(1), range(8))
    path = cache.folder / f"{name_of(1)}.part"
    data = path.read_bytes()
    changed = {"header": b"[" * 5000 + data[5000:], "short": data[:-1], "long": data + b"x"}
    path.write_bytes(changed.get(damage, data))
    size = SIZE - 1 if damage == "other size" else SIZE
    chunk = CHUNK + 1 if damage == "other chunks" else CHUNK
    with cache.receive(name_of(1), size, chunk, "a") as incoming:
        assert set(incoming.held) == {b""}
        assert path.stat().st_size == About("", "", size, chunk).file_bytes


@pytest.mark.parametrize("damage", ["header", "short", "empty", "other name"])
def test_a_damaged_file_is_not_found_and_is_replaced(cache, damage):
    put(cache, 1)
    path = cache.folder / f"{name_of(1)}.slice"
    data = path.read_bytes()
    changed = {"header": b"{}" + data[2:], "short": data[:5000], "empty": b""}
    path.write_bytes(changed.get(damage, data.replace(name_of(1).encode(), name_of(2).encode())))
    assert cache.find(name_of(1), SIZE) is None
    (entry,) = cache.entries()
    assert entry.name == name_of(1)
    put(cache, 1)
    np.testing.assert_array_equal(cache.find(name_of(1), SIZE), slice_of(1))
    assert len(cache.entries()) == 1


def test_chunks_that_are_missing(cache):
    with cache.receive(name_of(1), SIZE, CHUNK, "a") as incoming:
        send(incoming, slice_of(1), range(9))
        with pytest.raises(ClusterError, match="1 of 10 chunks of the slice are missing"):
            incoming.finish()
    assert cache.find(name_of(1), SIZE) is None


def _receive_in_halves(ours, folder) -> None:
    with SliceCache(folder).receive(name_of(1), SIZE, CHUNK, "a") as incoming:
        send(incoming, slice_of(1), range(5))
        ours.send("half")
        ours.recv()
        send(incoming, slice_of(1))
        data = incoming.finish()
    ours.send((data == slice_of(1)).all())
    ours.recv()


def test_one_slice_received_twice_at_once(cache, process):
    """By two processes that wait for one another in the middle."""
    receivers, words = zip(*(process(_receive_in_halves) for _ in range(2)), strict=True)
    assert [word.recv() for word in words] == ["half"] * 2
    assert sorted(entry.path.name for entry in cache.entries()) == [f"{name_of(1)}.1.part", f"{name_of(1)}.part"]
    assert all(entry.busy for entry in cache.entries())
    for word in words:
        word.send("go on")
    assert [word.recv() for word in words] == [True] * 2
    (entry,) = cache.entries()
    assert (entry.whole, entry.busy) == (True, True)
    for receiver, word in zip(receivers, words, strict=True):
        word.send("go on")
        receiver.join()
    assert not cache.entries()[0].busy
    np.testing.assert_array_equal(cache.find(name_of(1), SIZE), slice_of(1))


def _receive_more_than_is_allowed(ours, folder) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (SIZE // 2, resource.RLIM_INFINITY))
    incoming = SliceCache(folder, notify=ours.send).receive(name_of(1), SIZE, CHUNK, "a")
    ours.send(type(incoming).__name__)


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
def test_a_file_that_the_system_does_not_let_grow(cache, process):
    """The room is taken before the first byte, and nothing is left of a file that cannot have it."""
    _, words = process(_receive_more_than_is_allowed)
    assert words.recv().endswith(f"{cache.folder} cannot be used: file too large")
    assert words.recv() == "MemoryIncoming"
    assert cache.entries() == []
