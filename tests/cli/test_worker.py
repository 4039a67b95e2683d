"""`dllama worker`: its first start, what it logs, how it ends, and that nothing that comes to its port ends it."""

import os
import random
import signal
import socket
import urllib.request

import pytest

from dllama import Llama, SamplerSettings
from dllama.cluster import key as cluster_key
from dllama.cluster.settings import ClusterSettings
from tests.cli.program import dllama, fails, succeeds
from tests.cli.workers import Worker

GREEDY = ("inference", "--prompt", "Tom has 3 apples", "--temperature", "0", "--steps", "6", "--quiet")
EVEN = ("--ratios", "1:1", "--nthreads", "1", "--buffer-float-type", "f32")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("worker")


@pytest.fixture(scope="module")
def worker(folder):
    """A worker that has made its key; no test may end it."""
    with Worker(folder) as worker:
        yield worker
        assert worker.process.poll() is None


@pytest.fixture(scope="module")
def text():
    """What one node generates."""
    return succeeds(*GREEDY, "--buffer-float-type", "f32")


def serves(worker, text: str, environment: dict | None = None) -> bool:
    """Whether a root gets the right text with it."""
    return succeeds(*GREEDY, *EVEN, "--workers", worker.address, **(environment or worker.environment)) == text


def test_the_first_start_makes_a_key_and_tells_how_to_join(worker):
    key = cluster_key.load(worker.key_file)
    shown = "\n".join(worker.lines)
    assert f"New cluster key {key.fingerprint} in {worker.key_file}" in shown
    copy = cluster_key.copy_command(worker.key_file, "127.0.0.1")
    assert f"  {copy}\n  dllama inference --model model.m" in shown
    assert f"  {copy}\n  dllama worker\n" in shown
    assert not any(half.decode() in shown for half in key)
    worker.says(rf"^\d{{4}}-\d\d-\d\d \d\d:\d\d:\d\d listening on .*, 1 thread, cluster key {key.fingerprint}$")
    worker.says(rf"a root reaches it with --workers {worker.address}$")


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_ends_at_a_signal_and_says_nothing(worker, folder, number, status):
    with Worker(folder) as another:  # it has the key already
        assert another.end(number) == status
        assert len(another.lines) == 2


def test_a_root_is_served_and_the_log_tells(worker, text):
    assert serves(worker, text)
    worker.says("a root has come")
    worker.says(r"ready: model\.m, 8 of 16 heads")
    worker.says("the root has left")


def test_the_next_start_takes_the_slice_from_the_disk(worker, text, folder):
    assert serves(worker, text)
    listed = succeeds("cache", "list", **worker.environment)
    assert "model.m" in listed
    files = sorted((folder / "cache" / "dllama" / "slices").glob("*.slice"))
    inodes = [file.stat().st_ino for file in files]
    assert serves(worker, text)
    assert [file.stat().st_ino for file in files] == inodes


def test_a_copy_of_the_model_is_used_where_it_is(worker, text, embedded, tmp_path):
    with Worker(tmp_path, "--model", embedded.model, "--key-file", worker.key_file) as another:
        assert serves(another, text, worker.environment)
    assert not (tmp_path / "cache" / "dllama" / "slices").exists()
    assert "New cluster key" not in "\n".join(another.lines)


def test_another_key(worker, text, tmp_path):
    cluster_key.create(tmp_path / "other.key")
    message = fails(*GREEDY, "--workers", worker.address, "--key-file", tmp_path / "other.key")
    assert message == f"worker {worker.address}: it has another cluster key"
    worker.says("a connection was dropped: it has another cluster key")
    assert serves(worker, text)


def test_one_side_without_a_key(worker, text, tmp_path):
    result = dllama(*GREEDY, "--workers", worker.address, "--insecure")
    assert result.returncode == 1 and result.stdout == ""
    said, error = result.stderr.splitlines()
    assert "--insecure: nothing is encrypted" in said
    assert error.endswith(f"worker {worker.address}: it asks for the cluster key, and --insecure was given here")
    worker.says("a connection was dropped: ")
    with Worker(tmp_path, "--insecure") as open_to_all:
        open_to_all.says("--insecure: anybody who reaches it can use this device")
        message = fails(*GREEDY, "--workers", open_to_all.address, **worker.environment)
        assert "it runs with --insecure, and here the cluster key is asked for" in message
        assert succeeds(*GREEDY, *EVEN, "--workers", open_to_all.address, "--insecure") == text
    assert not open_to_all.key_file.exists()


def test_what_is_no_node_is_dropped(worker, text):
    random_bytes = random.Random(1).randbytes(100_000)
    for noise in (b"", b"\0", b"GET / HTTP/1.1\r\n\r\n", b"\xff" + bytes(8) + b"\x7f\x03", random_bytes):
        with socket.create_connection(("127.0.0.1", worker.port)) as connection:
            connection.settimeout(10)
            try:
                connection.sendall(noise)
                connection.shutdown(socket.SHUT_WR)
                while connection.recv(4096):
                    pass
            except OSError:
                pass  # dropped, as it should be
    with pytest.raises(OSError):
        urllib.request.urlopen(f"http://{worker.address}/", timeout=10)
    worker.says("a connection was dropped: ", times=3)
    assert serves(worker, text)


def test_a_busy_worker_refuses_a_second_root(worker, text):
    settings = ClusterSettings((worker.address,), cluster_key.load(worker.key_file), (1.0, 1.0))
    with Llama(nthreads=1, buffer_float_type="f32", cluster=settings) as llama:
        message = fails(*GREEDY, "--workers", worker.address, **worker.environment)
        assert message == f"worker {worker.address}: this worker is busy with another root; try again later"
        pieces = llama.generate("Tom has 3 apples", 6, SamplerSettings(temperature=0))
        assert "".join(piece.text for piece in pieces) + "\n" == text
    worker.says("refused a second root")
    assert serves(worker, text)


def test_too_little_memory(worker, tmp_path):
    with Worker(tmp_path, "--memory", "100MB", "--key-file", worker.key_file) as small:
        message = fails(*GREEDY, *EVEN, "--workers", small.address, **worker.environment)
        assert small.address in message
        assert "100.0 MB" in message or "100000000 bytes" in message
        assert small.process.poll() is None


def test_what_it_cannot_start_with(worker, tmp_path):
    run = ("worker", "--port", worker.port, "--host", "127.0.0.1", "--nthreads", "1")
    assert fails(*run, **worker.environment) == (
        f"port {worker.port} is in use, perhaps by another worker; choose another with --port"
    )
    missing, loose = tmp_path / "missing.key", tmp_path / "loose.key"
    assert fails(*run, "--key-file", missing).startswith(f"{missing}: no such file or folder; copy it from a device")
    assert fails(*run, DLLAMA_KEY_FILE=str(missing)).startswith(f"{missing}: no such file or folder")
    cluster_key.create(loose)
    os.chmod(loose, 0o644)
    assert fails(*run, "--key-file", loose) == (
        f"{loose}: this cluster key is open to other users of the device; first: chmod 600 {loose}"
    )
    assert fails(*run, "--insecure", "--model", missing) == f"{missing}: no such file or folder"
    elsewhere = ("worker", "--host", "192.0.2.1", "--insecure", "--nthreads", "1")
    assert fails(*elsewhere) == "192.0.2.1 is no address of this device"
    assert "'2' is not a memory size such as 2GiB" in fails("worker", "--memory", "2", status=2)
