"""`dllama doctor`: what it finds of this machine and of real workers, and what it says to do."""

import json
import os
import subprocess
import sys

import pytest

from dllama import __version__
from dllama.cluster import key as cluster_key
from tests.cli.program import ROOT, command, dllama, fails, succeeds
from tests.cli.workers import Worker


@pytest.fixture(scope="module")
def worker(tmp_path_factory):
    with Worker(tmp_path_factory.mktemp("worker")) as worker:
        yield worker


def doctor(*args, status: int = 0, **environment) -> dict:
    """The findings, by node and check."""
    result = dllama("doctor", "--json", *args, **environment)
    assert result.returncode == status, result.stderr
    values = json.loads(result.stdout)
    assert values["version"] == __version__
    return {(found["node"], found["check"]): found for found in values["findings"]}


def test_this_machine():
    found = doctor()
    assert {node for node, _ in found} == {"this machine"}
    checks = {"system", "version", "kernels", "compiled", "speed", "governor", "temperature", "throttling"}
    assert {check for _, check in found} == checks | {"swap", "clock", "disk", "memory"}
    assert found["this machine", "version"]["value"] == __version__
    assert found["this machine", "speed"]["value"] > 1e8
    assert all(one["advice"] for one in found.values() if one["state"] in ("slow", "wrong"))


def test_the_text_tells_the_same():
    lines = succeeds("doctor").splitlines()
    assert lines[0] == "this machine"
    assert any(f"dllama {__version__}, Python" in line for line in lines)
    assert lines[-1].startswith("0 wrong, ")


def test_too_little_memory_alone():
    found = doctor(status=1, DLLAMA_MEMORY_LIMIT="50000000")["this machine", "memory"]
    assert found["state"] == "wrong" and "of memory needed" in found["text"]
    assert "--workers" in found["advice"]


def test_kernels_that_do_not_exist():
    environment = os.environ | {"DLLAMA_KERNELS": "none"}  # read when the kernels are imported: a start from scratch
    result = subprocess.run(command("doctor"), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 1
    assert "DLLAMA_KERNELS=none: no such kernels" in result.stdout
    assert "unset DLLAMA_KERNELS, and the best are chosen" in result.stdout


def test_a_worker_that_is_well(worker):
    found = doctor("--workers", worker.address, **worker.environment)
    for check in ("reach", "link", "round trip", "speed", "memory", "model"):
        assert found[worker.address, check]["state"] in ("ok", "slow"), check
    assert found[worker.address, "reach"]["state"] == "ok"
    assert found[worker.address, "link"]["value"] > 0
    key = cluster_key.load(worker.key_file)
    assert found["this machine", "key"]["value"] == key.fingerprint


def test_one_that_is_not_there_and_one_with_another_key(worker, tmp_path):
    key_file = tmp_path / "other.key"
    cluster_key.create(key_file)
    found = doctor("--workers", "127.0.0.1:9", worker.address, "nowhere.invalid", "--key-file", key_file, status=1)
    assert found["127.0.0.1:9", "reach"]["state"] == "wrong"
    assert "dllama worker" in found["127.0.0.1:9", "reach"]["advice"]
    assert found[worker.address, "key"]["text"] == "it has another cluster key"
    assert found["nowhere.invalid:9998", "reach"]["advice"].startswith("check the name")
    assert found["this machine", "model"]["state"] == "ok"  # which is told of the nodes that are well


def test_one_side_without_a_key(worker):
    found = doctor("--workers", worker.address, "--insecure", status=1)
    assert found[worker.address, "key"]["advice"] == "leave out --insecure"


def test_no_key(worker, tmp_path):
    found = doctor("--workers", worker.address, "--key-file", tmp_path / "missing.key", status=1)
    assert found["this machine", "key"]["state"] == "wrong"
    assert not any(node == worker.address for node, _ in found)


def test_a_cluster_that_cannot_hold_the_model(worker, tmp_path):
    limit = {**worker.environment, "DLLAMA_MEMORY_LIMIT": "1000000"}
    found = doctor("--workers", worker.address, status=1, **limit)["this machine", "model"]
    assert found["state"] == "wrong" and "not enough memory" in found["text"]


def test_the_workers_themselves(worker, tmp_path):
    """ssh is a program of the test's own that runs the command here: there is no other machine."""
    ssh = tmp_path / "ssh"
    ssh.write_text(
        '#!/bin/sh\nwhile [ "$1" != -- ]; do shift; done\n[ "$2" = pi@127.0.0.1 ] || exit 1\n'
        f'dllama() {{ {sys.executable} -m dllama "$@"; }}\neval "$3"\n'
    )
    ssh.chmod(0o755)
    path = {**worker.environment, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}"}
    found = doctor("--workers", f"pi@{worker.address}", "--ssh", **path)
    assert found[worker.address, "version"]["value"] == __version__
    assert found[worker.address, "kernels"]["state"] in ("ok", "slow")
    ssh.write_text("#!/bin/sh\necho 'Permission denied (publickey).' >&2\nexit 255\n")
    refused = doctor("--workers", worker.address, "--ssh", **path)[worker.address, "ssh"]
    assert refused["state"] == "unknown" and refused["text"] == "Permission denied (publickey)."
    assert refused["advice"].startswith("this has to work without a password: ssh 127.0.0.1 dllama-node doctor")


def test_no_address_over_ssh(worker):
    found = doctor("--workers", "pi@127.0.0.1:0", "--ssh", status=1, **worker.environment)
    assert found["127.0.0.1:0", "reach"]["advice"] == "give HOST or HOST:PORT"


def test_options_that_make_no_sense():
    assert "it needs --workers" in fails("doctor", "--ssh", status=2)
    assert "it needs --workers" in fails("doctor", "--insecure", status=2)
