"""The cache of slices: what breaks off goes on, what is in use stays, and no process harms another."""

import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest

from dllama.cluster import slice_file
from dllama.cluster.slice_cache import SliceCache
from dllama.cluster.slice_file import HEADER_BYTES, About
from dllama.cluster.transfer import MemoryIncoming, chunk_digest
from dllama.errors import ClusterError, FileError

CHUNK = 10_000
SIZE = 10 * CHUNK - 77
DAY = 86400


def name_of(number: int) -> str:
    return f"{number:032x}"


def file_bytes(nbytes: int = SIZE) -> int:
    return About("", "", nbytes, CHUNK).file_bytes


def slice_of(number: int, nbytes: int = SIZE) -> np.ndarray:
    """The bytes of a made-up slice."""
    return np.random.default_rng(number).integers(0, 256, nbytes, np.uint8)


def send(incoming, data, indexes=None) -> None:
    """Give the transfer these chunks, by default those that it does not hold."""
    wanted = [i for i, digest in enumerate(incoming.held) if not digest] if indexes is None else indexes
    for index in wanted:
        chunk = data[index * CHUNK : (index + 1) * CHUNK]
        incoming.write(index, chunk, chunk_digest(chunk))


def put(cache, number: int, used: float | None = None) -> None:
    """Have a slice in the cache, used last at this time."""
    with cache.receive(name_of(number), SIZE, CHUNK, f"slice {number}") as incoming:
        send(incoming, slice_of(number))
        incoming.finish()
    if used is not None:
        os.utime(cache.folder / f"{name_of(number)}.slice", (used, used))


def names(cache) -> list[int]:
    return [int(entry.name, 16) for entry in cache.entries()]


@pytest.fixture
def notices():
    return []


@pytest.fixture
def cache(tmp_path, notices):
    return SliceCache(tmp_path / "slices", notify=notices.append)


@pytest.fixture
def process(cache):
    """process(script): another process on the same cache, its output a pipe; `cache` and these helpers are defined."""
    started = []

    def start(script: str) -> subprocess.Popen:
        head = f"""
            from tests.cluster.test_slice_cache import *
            cache = SliceCache({str(cache.folder)!r}, notify=print)
            def say(text):
                print(text, flush=True)
        """
        code = textwrap.dedent(head) + textwrap.dedent(script)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[2], **pipes))
        return started[-1]

    yield start
    for one in started:
        one.kill()
        one.communicate()


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


def test_an_empty_slice(cache):
    with cache.receive(name_of(1), 0, CHUNK, "nothing") as incoming:
        assert incoming.finish().shape == (0,)
    assert cache.find(name_of(1), 0).shape == (0,)


def test_the_label_may_be_any_text(cache):
    with cache.receive(name_of(1), SIZE, CHUNK, "\N{GRINNING FACE}" * 1000):
        (entry,) = cache.entries()
    assert entry.label == "\N{GRINNING FACE}" * 200


@pytest.mark.parametrize(
    "name", ["", "../../etc/passwd", "0" * 31, "0" * 33, "A" * 32, "0" * 31 + "/", "0" * 32 + "\n"]
)
def test_names_that_are_none(cache, name):
    for call in (lambda: cache.find(name, 1), lambda: cache.receive(name, 1, CHUNK, ""), lambda: cache.verify(name)):
        with pytest.raises(ClusterError, match="is no name of a slice"):
            call()
    assert not cache.folder.exists()


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


def test_a_transfer_goes_on_after_its_process_was_killed(cache, process):
    receiver = process(f"""
        incoming = cache.receive(name_of(1), {SIZE}, {CHUNK}, "a")
        for index in range(10):
            send(incoming, slice_of(1), [index])
            say(index)
            if index == 5:
                time.sleep(60)
    """)
    while receiver.stdout.readline() != "5\n":
        pass
    receiver.send_signal(signal.SIGKILL)
    receiver.wait()
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


def test_one_slice_received_twice_at_once(cache, process):
    """By two processes that wait for one another in the middle."""
    script = f"""
        with cache.receive(name_of(1), {SIZE}, {CHUNK}, "a") as incoming:
            send(incoming, slice_of(1), range(5))
            say("half")
            input()
            send(incoming, slice_of(1))
            data = incoming.finish()
        say((data == slice_of(1)).all())
        input()
    """
    receivers = [process(script) for _ in range(2)]
    assert [one.stdout.readline() for one in receivers] == ["half\n"] * 2
    assert sorted(entry.path.name for entry in cache.entries()) == [f"{name_of(1)}.1.part", f"{name_of(1)}.part"]
    assert all(entry.busy for entry in cache.entries())
    for one in receivers:
        one.stdin.write("\n")
        one.stdin.flush()
    assert [one.stdout.readline() for one in receivers] == ["True\n"] * 2
    (entry,) = cache.entries()
    assert (entry.whole, entry.busy) == (True, True)
    for one in receivers:
        one.communicate("\n")
    assert not cache.entries()[0].busy
    np.testing.assert_array_equal(cache.find(name_of(1), SIZE), slice_of(1))


def test_many_processes_on_one_small_cache(cache, process):
    """Each receives, finds and reads slices that the others evict."""
    script = f"""
        import random
        random.seed(SEED)
        cache = SliceCache(cache.folder, limit={3 * file_bytes()})
        for _ in range(40):
            number = random.randrange(5)
            data = cache.find(name_of(number), {SIZE})
            if data is None:
                with cache.receive(name_of(number), {SIZE}, {CHUNK}, "a") as incoming:
                    send(incoming, slice_of(number))
                    data = incoming.finish()
            assert (data == slice_of(number)).all()
        say("done")
    """
    workers = [process(script.replace("SEED", str(seed))) for seed in range(3)]
    assert [worker.communicate()[0] for worker in workers] == ["done\n"] * 3
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


def test_what_is_in_use_stays(tmp_path, notices, process):
    cache = SliceCache(tmp_path / "slices", limit=3 * file_bytes(), notify=notices.append)
    now = time.time()
    for number in (1, 2, 3):
        put(cache, number, used=now - 1000 + number)
    user = process(f"data = cache.find(name_of(1), {SIZE}); say('mapped'); time.sleep(60)")
    assert user.stdout.readline() == "mapped\n"
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
    user.wait()
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


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
def test_a_file_that_the_system_does_not_let_grow(cache, process):
    """The room is taken before the first byte, and nothing is left of a file that cannot have it."""
    receiver = process(f"""
        resource.setrlimit(resource.RLIMIT_FSIZE, ({SIZE // 2}, resource.RLIM_INFINITY))
        say(type(cache.receive(name_of(1), {SIZE}, {CHUNK}, "a")).__name__)
    """)
    output = receiver.communicate()[0].splitlines()
    assert output[0].endswith(f"{cache.folder} cannot be used: file too large")
    assert output[1] == "MemoryIncoming"
    assert cache.entries() == []


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
