"""The cache of slices: what is in use stays, what is not makes room, and no process harms another."""

import os
import random
import shutil
import subprocess
import time

import numpy as np
import pytest

from dllama.cluster.slice_cache import SliceCache
from dllama.cluster.slice_file import HEADER_BYTES
from dllama.cluster.transfer import MemoryIncoming
from dllama.errors import ClusterError, FileError
from tests.cluster.made_slices import CHUNK, SIZE, file_bytes, name_of, put, send, slice_of

DAY = 86400


def names(cache) -> list[int]:
    return [int(entry.name, 16) for entry in cache.entries()]


def test_a_slice_comes_once(cache, notices):
    data = slice_of(1)
    assert cache.find(name_of(1), SIZE) is None
    with cache.receive(name_of(1), SIZE, CHUNK, "model.m, heads 0-4") as incoming:
        assert incoming.held == [b""] * 10
        send(incoming, data, [9, 3])
        assert incoming.done_bytes == 2 * CHUNK - 77
        send(incoming, data)
        found = incoming.finish()
    for array in (found, cache.find(name_of(1), SIZE), SliceCache(cache.folder).find(name_of(1), SIZE)):
        np.testing.assert_array_equal(array, data)
        assert not array.flags.writeable
        assert array.ctypes.data % 64 == 0
    (entry,) = cache.entries()
    assert (entry.name, entry.label, entry.nbytes, entry.whole) == (name_of(1), "model.m, heads 0-4", SIZE, True)
    assert entry.file_bytes == file_bytes() == entry.path.stat().st_size
    assert notices == []
    assert cache.find(name_of(1), SIZE - 1) is None
    assert cache.find(name_of(2), SIZE) is None


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "0" * 31, "0" * 33, "A" * 32, "0" * 31 + "/", "0" * 32 + "\n"]
)
def test_names_that_are_none(cache, name):
    for call in (lambda: cache.find(name, 1), lambda: cache.receive(name, 1, CHUNK, ""), lambda: cache.verify(name)):
        with pytest.raises(ClusterError, match="is no name of a slice"):
            call()
    assert not cache.folder.exists()


def _use(ours, folder, seed: int) -> None:
    chance = random.Random(seed)
    cache = SliceCache(folder, limit=3 * file_bytes())
    for _ in range(40):
        number = chance.randrange(5)
        data = cache.find(name_of(number), SIZE)
        if data is None:
            with cache.receive(name_of(number), SIZE, CHUNK, "a") as incoming:
                send(incoming, slice_of(number))
                data = incoming.finish()
        assert (data == slice_of(number)).all()
    ours.send("done")


def test_many_processes_on_one_small_cache(cache, process):
    """Each receives, finds and reads slices that the others evict."""
    words = [process(_use, seed)[1] for seed in range(3)]
    assert [word.recv() for word in words] == ["done"] * 3
    assert sum(entry.file_bytes for entry in cache.entries()) <= 3 * file_bytes()
    assert all(cache.verify(entry.name) == 0 for entry in cache.entries())


def test_what_has_not_been_used_for_longest_makes_room(tmp_path, notices):
    cache = SliceCache(tmp_path / "slices", limit=3 * file_bytes(), notify=notices.append)
    now = time.time()
    for number in (1, 2, 3):
        put(cache, number, used=now - 1000 + number)
    assert names(cache) == [3, 2, 1]
    assert cache.find(name_of(1), SIZE) is not None
    assert names(cache) == [1, 3, 2]
    put(cache, 4)
    assert names(cache) == [4, 1, 3]
    with cache.receive(name_of(5), SIZE, CHUNK, "a"):
        pass
    assert names(cache) == [5, 4, 1]
    assert notices == []


def _hold(ours, folder) -> None:
    data = SliceCache(folder).find(name_of(1), SIZE)
    ours.send(data.nbytes)
    ours.recv()  # for ever


def test_what_is_in_use_stays(tmp_path, notices, process):
    cache = SliceCache(tmp_path / "slices", limit=3 * file_bytes(), notify=notices.append)
    now = time.time()
    for number in (1, 2, 3):
        put(cache, number, used=now - 1000 + number)
    user, words = process(_hold)
    assert words.recv() == SIZE
    os.utime(cache.folder / f"{name_of(1)}.slice", (now - 2000, now - 2000))
    held = cache.find(name_of(2), SIZE)[5:7]  # any part of it
    put(cache, 4)
    assert names(cache) == [4, 2, 1]
    put(cache, 5)
    assert names(cache) == [5, 2, 1]
    both = [cache.find(name_of(5), SIZE), held]
    with cache.receive(name_of(6), SIZE, CHUNK, "a") as incoming:
        assert isinstance(incoming, MemoryIncoming)
        send(incoming, slice_of(6))
        np.testing.assert_array_equal(incoming.finish(), slice_of(6))
    (line,) = notices
    assert line.startswith("this slice stays in memory, and has to be sent again at the next start: ")
    assert "in use" in line
    user.kill()
    user.join()
    put(cache, 6)
    assert names(cache) == [6, 5, 2]
    del both, held
    put(cache, 7)
    put(cache, 8)
    assert names(cache) == [8, 7, 6]


def test_a_slice_beyond_the_limit_stays_in_memory_and_evicts_nothing(tmp_path, notices):
    cache = SliceCache(tmp_path / "slices", limit=2 * file_bytes(), notify=notices.append)
    put(cache, 1)
    with cache.receive(name_of(2), 3 * SIZE, CHUNK, "a") as incoming:
        send(incoming, slice_of(2, 3 * SIZE))
        np.testing.assert_array_equal(incoming.finish(), slice_of(2, 3 * SIZE))
    assert notices == [
        "this slice stays in memory, and has to be sent again at the next start: "
        f"304 kB needed, the limit of {cache.folder} is 208 kB"
    ]
    assert names(cache) == [1]
    assert cache.find(name_of(2), 3 * SIZE) is None


@pytest.mark.parametrize("folder", ["file/slices", "/proc/slices", "file"])
def test_a_folder_that_cannot_be_used(tmp_path, notices, folder):
    (tmp_path / "file").touch()
    cache = SliceCache(tmp_path / folder, notify=notices.append)
    assert cache.find(name_of(1), SIZE) is None
    with cache.receive(name_of(1), SIZE, CHUNK, "a") as incoming:
        send(incoming, slice_of(1))
        np.testing.assert_array_equal(incoming.finish(), slice_of(1))
    assert f"{cache.folder} cannot be used: " in notices[0]
    assert len(notices) == 1


@pytest.fixture
def tiny_disk(tmp_path):
    """A disk of 1 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "none", str(folder)]
    if os.geteuid() or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs the right to mount")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_disk_that_is_too_small(tiny_disk, notices):
    cache = SliceCache(tiny_disk, limit=1 << 40, notify=notices.append)
    for number in range(12):  # 104 kB each
        put(cache, number, used=number)
    assert names(cache) == list(range(11, 2, -1))
    assert notices == []
    in_use = [cache.find(name_of(number), SIZE) for number in range(3, 12)]
    with cache.receive(name_of(20), SIZE, CHUNK, "a") as incoming:
        assert isinstance(incoming, MemoryIncoming)
    assert f"104 kB needed, and 90 kB are free on the disk of {tiny_disk}" in notices[0]
    assert len(in_use) == len(cache.entries())


def test_half_of_the_disk_is_the_limit(tiny_disk, notices):
    cache = SliceCache(tiny_disk, notify=notices.append)
    for number in range(12):
        put(cache, number, used=number)
    assert names(cache) == [11, 10, 9, 8]  # a fifth would leave less than half of 1 MB, in whole pages
    (tiny_disk / "other").write_bytes(bytes(400_000))
    put(cache, 12)
    assert names(cache) == [12, 11, 10]
    assert notices == []


def test_broken_transfers_are_given_up_in_time(cache):
    for number in (1, 2, 3):
        with cache.receive(name_of(number), SIZE, CHUNK, "a") as incoming:
            send(incoming, slice_of(number), range(3))
    put(cache, 4, used=time.time() - 20 * DAY)
    going_on = cache.receive(name_of(3), SIZE, CHUNK, "a")
    for number, days in ((1, 6.9), (2, 7.1), (3, 30)):
        then = time.time() - days * DAY
        os.utime(cache.folder / f"{name_of(number)}.part", (then, then))
    cache.receive(name_of(5), SIZE, CHUNK, "a").close()
    assert names(cache) == [5, 1, 4, 3]
    going_on.close()


def test_clearing(cache):
    now = time.time()
    for number in range(4):
        put(cache, number, used=now - number * DAY)
    (cache.folder / "notes.txt").write_text("somebody's")
    in_use = cache.find(name_of(3), SIZE)
    os.utime(cache.folder / f"{name_of(3)}.slice", (now - 3 * DAY,) * 2)
    done = cache.clear(older_than=1.5 * DAY)
    assert (done.files, done.nbytes, done.busy) == (1, file_bytes(), 1)
    assert names(cache) == [0, 1, 3]
    assert cache.clear([name_of(1), name_of(7)]).files == 1
    assert names(cache) == [0, 3]
    del in_use
    assert cache.clear().nbytes == 2 * file_bytes()
    assert cache.entries() == []
    assert (cache.folder / "notes.txt").exists()
    shutil.rmtree(cache.folder)
    assert cache.clear().files == 0
    assert cache.entries() == []
    assert not cache.folder.exists()


def test_verifying(cache):
    put(cache, 1)
    assert cache.verify(name_of(1)) == 0
    with open(cache.folder / f"{name_of(1)}.slice", "r+b") as file:
        file.seek(HEADER_BYTES + 3 * CHUNK)
        file.write(bytes(CHUNK + 1))
    assert cache.verify(name_of(1)) == 2
    with pytest.raises(FileError, match=f"{name_of(2)}.slice: no such file"):
        cache.verify(name_of(2))
    (cache.folder / f"{name_of(2)}.slice").touch()
    with pytest.raises(FileError, match=f"{name_of(2)}.slice: not a slice"):
        cache.verify(name_of(2))
