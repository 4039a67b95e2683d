"""The root of a cluster on the command line: which workers it takes, and what it says of those that it cannot."""

import contextlib
import http.server
import json
import os
import signal
import socket
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from dllama.cluster import key as cluster_key
from tests.cli.program import ROOT, command, dllama, fails, succeeds
from tests.cli.workers import Worker

PROMPT = ("--prompt", "Tom has 3 apples", "--quiet")
GREEDY = ("inference", *PROMPT, "--temperature", "0", "--steps", "10", "--buffer-float-type", "f32")
LONG = ("inference", *PROMPT, "--temperature", "1000", "--topp", "1", "--seed", "3", "--buffer-float-type", "f32")
"""At random, so that it does not end early."""


@pytest.fixture(scope="module")
def text():
    """What one node generates."""
    return succeeds(*GREEDY)


@pytest.fixture(scope="module")
def workers(tmp_path_factory):
    """Two workers with the same key, which is that of ``workers[0].environment``."""
    folder = tmp_path_factory.mktemp("workers")
    with Worker(folder) as first, Worker(folder) as second:
        yield first, second


@contextlib.contextmanager
def listening(answer: bytes):
    """A port where every connection gets this answer."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.sendall(answer)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def test_workers_after_one_option_repeated_and_with_commas(workers, text):
    first, second = (worker.address for worker in workers)
    ratios = ("--ratios", "2:1:1", "--nthreads", "1")
    for given in (
        ("--workers", first, second),
        ("--workers", f"{first},{second}"),
        (f"--workers={first}", "--workers", second.replace("127.0.0.1", "localhost")),
    ):
        assert succeeds(*GREEDY, *given, *ratios, **workers[0].environment) == text
    for worker in workers:
        worker.says(r"ready: model\.m, 4 of 16 heads", times=3)


def test_workers_that_would_not_help_are_left_out(workers, text):
    result = dllama(*GREEDY, "--workers", workers[0].address, "--nthreads", "1", **workers[0].environment)
    assert result.stdout == text
    assert f"worker {workers[0].address} is left out: it is too slow to help" in result.stderr


def test_perplexity_over_a_cluster(workers, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text("Tom has 3 apples. He buys 4 more. How many apples does Tom have?")
    run = ("perplexity", "--file", path, "--json", "--buffer-float-type", "f32")
    cluster = ("--workers", workers[0].address, "--ratios", "1:1", "--nthreads", "1")
    alone, shared = (json.loads(succeeds(*run, *more, **workers[0].environment)) for more in ((), cluster))
    assert shared["perplexity"] == pytest.approx(alone["perplexity"], rel=1e-5)


def test_without_a_key_it_says_how_to_get_one(tmp_path):
    message = fails(*GREEDY, "--workers", "192.0.2.7", XDG_CONFIG_HOME=str(tmp_path), DLLAMA_KEY_FILE="")
    folder = tmp_path / "dllama"
    assert message == (
        f"no cluster key in {folder}/cluster.key: copy it from a worker: "
        f"mkdir -p -m 700 {folder} && scp -p 192.0.2.7:.config/dllama/cluster.key {folder}/"
    )
    named = fails(*GREEDY, "--workers", "192.0.2.7", DLLAMA_KEY_FILE=str(tmp_path / "lab.key"))
    assert named.startswith(f"{tmp_path}/lab.key: no such file or folder; copy it from a device that has it")


@pytest.fixture(scope="module")
def key_file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("key") / "cluster.key"
    cluster_key.create(path)
    return path


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (["127.0.0.1:70000"], "'127.0.0.1:70000' is no address such as 10.0.0.2:9998"),
        (["127.0.0.1:"], "'127.0.0.1:' is no address"),
        (["a b"], "'a b:9998' is no address"),
        (["fe80::1"], "'fe80::1' is no address such as 10.0.0.2:9998 or [fe80::1%eth0]:9998"),
        (["shelf.invalid"], "shelf.invalid: no such host"),
        (["127.0.0.1,", "127.0.0.1:9998"], "worker 127.0.0.1:9998 is given twice"),
        (["127.0.0.1:99,localhost:99"], "worker 127.0.0.1:99 is given twice, as 127.0.0.1:99 and as localhost:99"),
        (["[::1]", "[::1]:9998"], "worker [::1]:9998 is given twice"),
    ],
)
def test_workers_that_make_no_sense(workers, message, key_file):
    assert fails(*GREEDY, "--key-file", key_file, "--workers", *workers).startswith(message)


def test_ratios_that_do_not_match(key_file):
    for given, n in ((("--local-workers", "1"), "1 worker"), (("--workers", "a", "b", "--insecure"), "2 workers")):
        message = fails(*GREEDY, *given, "--ratios", "1:1:1:1")
        assert message.startswith(f"4 ratios for this machine and {n}: each needs one, this machine's first")
    assert "its ratio is 0, and has to be a number above 0" in fails(*GREEDY, "--local-workers", "1", "--ratios", "1:0")


def test_what_is_no_worker(key_file):
    web = http.server.ThreadingHTTPServer(("127.0.0.1", 0), http.server.BaseHTTPRequestHandler)
    threading.Thread(target=web.serve_forever, daemon=True).start()
    with web, listening(b"") as silent, listening(b"SSH-2.0-OpenSSH_9.2\r\n") as other, ThreadPoolExecutor() as pool:
        run = partial(fails, *GREEDY, "--key-file", key_file, "--workers")
        addresses = [f"127.0.0.1:{web.server_port}", silent, other, "127.0.0.1:1"]
        *strangers, nobody = pool.map(run, addresses)
        for address, message in zip(addresses, strangers, strict=False):
            assert message.startswith(f"worker {address}: what ") and "dllama worker" in message
        assert nobody == "worker 127.0.0.1:1: nothing listens there; is 'dllama worker' running?"
        web.shutdown()


def test_local_workers_generate_the_same_text(text, tmp_path):
    path = tmp_path / "run.json"
    result = dllama(*GREEDY, "--local-workers", "2", "--stats", path)
    assert (result.returncode, result.stdout, result.stderr) == (0, text, "")
    statistics = json.loads(path.read_text())
    root, *others = statistics["nodes"]
    assert root["name"] == "root" and len(others) == 2
    for node in (root, *others):
        figures = {name: series for name, series in node.items() if name != "name"}
        assert set(figures) == {"inference_ms", "transfer_ms", "sent_bytes", "received_bytes"}
        for series in figures.values():
            assert series[0] is None and len(series) == statistics["generated_tokens"]
            assert all(value > 0 for value in series[1:])
    assert root["sent_bytes"][1:] == statistics["sent_bytes"][1:]
    shares = statistics["cluster"]["nodes"]
    assert [share["name"] for share in shares] == [node["name"] for node in statistics["nodes"]]
    assert [len(range(*share["heads"])) for share in shares] == [6, 6, 4]
    assert statistics["cluster"]["left_out"] == []
    assert statistics["nthreads"] == max(1, len(os.sched_getaffinity(0)) // 3)


def test_ratios_of_local_workers_without_a_key(text, tmp_path):
    path = tmp_path / "run.json"
    result = dllama(*GREEDY, "--local-workers", "1", "--ratios", "3:1", "--insecure", "--stats", path)
    assert result.stdout == text
    assert "--insecure: nothing is encrypted" in result.stderr
    shares = json.loads(path.read_text())["cluster"]["nodes"]
    assert [len(range(*share["heads"])) for share in shares] == [12, 4]


def children(process) -> list[int]:
    return [int(pid) for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]


def ended(pid: int) -> bool:
    """Whether a process ends within a few seconds. Its entry stays until init looks for it, which may be a while."""
    for _ in range(100):
        try:
            state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
        except (FileNotFoundError, ProcessLookupError):
            return True
        if state == "Z":
            return True
        time.sleep(0.05)
    return False


@contextlib.contextmanager
def running(*options):
    """A long run with two local workers that has begun to generate: the process and theirs."""
    run = (*LONG, "--steps", "100000", "--local-workers", "2", *options)
    with subprocess.Popen(command(*run), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, bufsize=0) as root:
        root.first = b""
        while len(root.first) < 40:
            root.first += root.stdout.read(1)
        yield root, children(root)


def test_a_local_worker_that_is_killed(tmp_path):
    expected = succeeds(*LONG, "--steps", "300")
    with running("--steps", "300", "--stats", tmp_path / "run.json") as (root, (pid, other)):
        os.kill(pid, signal.SIGKILL)
        text, said = root.first + root.stdout.read(), root.stderr.read().decode()
        assert root.wait() == 0
    assert text.decode() == expected
    assert "is lost at token " in said
    assert "was ended by SIGKILL" in said.splitlines()[-1]
    assert ended(other)
    statistics = json.loads((tmp_path / "run.json").read_text())
    lost, stays = (node["inference_ms"] for node in statistics["nodes"][1:])
    if lost[-1] is not None:  # the one killed may be either
        lost, stays = stays, lost
    assert lost[-1] is None and lost[1] is not None
    assert None not in stays[1:]
    assert len(statistics["cluster"]["nodes"]) == 2


def test_local_workers_end_with_a_root_that_is_killed():
    with running() as (root, workers):
        root.kill()
    assert len(workers) == 2
    assert all(map(ended, workers))


def test_ctrl_c_ends_a_run_with_local_workers():
    with running() as (root, workers):
        root.send_signal(signal.SIGINT)
        root.stdout.read()
        assert root.stderr.read() == b""
        assert root.wait() == 130
    assert all(map(ended, workers))
