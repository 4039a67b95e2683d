"""`dllama inference --mode privatelora` and `dllama worker --device`: a text, and bad input in one line each."""

import json

import pytest

from dllama.embedded import model_path
from dllama.formats import ModelFile
from dllama.privatelora.adapter import CLOUD_FILE, EDGE_FILE, write_adapter
from tests.cli.conftest import CONFIG
from tests.cli.program import dllama, fails, succeeds
from tests.cli.workers import Worker
from tests.privatelora.adapters import strong_halves
from tests.privatelora.nodes import CloudProcess

GREEDY = ("inference", "--prompt", "Tom has 3 apples", "--temperature", "0", "--steps", "6", "--nthreads", "1")
PRIVATE = (*GREEDY, "--mode", "privatelora")


@pytest.fixture(scope="module")
def cloud():
    """A cloud of the embedded model without a key; no test may end it."""
    with CloudProcess(model_path(), types=("q80", "f16")) as cloud:
        yield cloud
        assert cloud.alive, cloud.lines
        assert "Traceback" not in "".join(cloud.lines)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """The folder of one for the embedded model."""
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(folder, *strong_halves(ModelFile(model_path()).config))
    return folder


def test_the_text_is_that_of_one_node(tmp_path):
    """With a local cloud, which is `dllama worker --device cpu` with a key."""
    stats = tmp_path / "stats.json"
    result = dllama(*PRIVATE, "--local-workers", "1", "--transfer-float-type", "f32", "--quiet", "--stats", stats)
    assert result.returncode == 0, result.stderr
    assert result.stdout == succeeds(*GREEDY, "--quiet")
    assert "4 layers in the cloud 127.0.0.1:" in result.stderr
    found = json.loads(stats.read_text())
    assert len(found["nodes"]) == 2 and found["cluster"] is None


def test_an_adapter_changes_the_text(cloud, adapter):
    here = ("--workers", cloud.address, "--insecure", "--quiet")
    text = succeeds(*PRIVATE, *here, "--adapter", adapter)
    assert text != succeeds(*GREEDY, "--quiet")
    assert text == succeeds(*PRIVATE, *here, "--adapter", adapter / EDGE_FILE, "--transfer-float-type", "q80")
    cloud.said("it has left")


def test_adapters_that_cannot_be_used(cloud, adapter, tmp_path):
    here = (*PRIVATE, "--workers", cloud.address, "--insecure", "--adapter")
    swapped = adapter / CLOUD_FILE
    assert fails(*here, swapped) == (
        f"{swapped}: this is the cloud's half (A and B), where the edge's half (M) belongs"
    )
    write_adapter(tmp_path, *strong_halves(CONFIG))
    assert fails(*here, tmp_path) == f"{tmp_path / EDGE_FILE}: for a model of 2 layers, and this one has 4"
    assert fails(*here, tmp_path / "missing") == f"{tmp_path / 'missing'}: no such file or folder"
    write_adapter(tmp_path, *strong_halves(ModelFile(model_path()).config, seed=None))
    assert fails(*here, tmp_path) == (
        f"cloud {cloud.address}: this cloud has not the A and B of that adapter: start its worker with "
        "--adapter cloud.plora, without --workers"
    )


def test_a_model_that_the_cloud_has_not(cloud, embedded, tmp_path):
    other = tmp_path / "other.m"
    data = bytearray(embedded.model.read_bytes())
    data[-1] ^= 1
    other.write_bytes(data)
    files = ("--model", other, "--tokenizer", embedded.tokenizer)
    assert fails(*PRIVATE, *files, "--workers", cloud.address, "--insecure") == (
        f"cloud {cloud.address}: this cloud has another model, model.m"
    )


def test_more_layers_than_the_model_has(cloud):
    assert fails(*PRIVATE, "--workers", cloud.address, "--insecure", "--edge-layers", "2:2") == (
        "--edge-layers 2:2 leaves the cloud none of the model's 4 layers"
    )


def test_a_worker_of_a_cluster_is_no_cloud(tmp_path):
    with Worker(tmp_path) as worker:
        assert fails(*PRIVATE, "--workers", worker.address, **worker.environment) == (
            f"cloud {worker.address}: this worker is part of a cluster; a cloud for edges is started with "
            "--device and --model"
        )
        worker.says("refused an edge, 127.0.0.1")
        greedy = (*GREEDY, "--quiet", "--buffer-float-type", "f32")
        cluster = ("--workers", worker.address, "--ratios", "1:1")
        assert succeeds(*greedy, *cluster, **worker.environment) == succeeds(*greedy)


def test_a_cloud_is_no_worker_of_a_cluster(cloud):
    message = fails(*GREEDY, "--workers", cloud.address, "--insecure", "--ratios", "1:1")
    assert message.startswith(f"worker {cloud.address}: this worker serves edges (it was started with --device)")


def test_the_first_start_of_a_cloud_tells_how_to_be_its_edge(embedded, tmp_path):
    with Worker(tmp_path, "--device", "cpu", "--model", embedded.model) as worker:
        shown = "\n".join(worker.lines)
        assert "whoever has it may use this cloud" in shown
        assert "dllama inference --mode privatelora --model model.m" in shown and "is to be the root" not in shown
        worker.says(f"an edge reaches it with --mode privatelora --workers {worker.address}$")
        found = json.loads(succeeds("doctor", "--workers", worker.address, "--json", **worker.environment))
    (finding,) = [one for one in found["findings"] if one["node"] == worker.address]
    assert finding["state"] == "ok" and "it is a cloud for edges, and no part of a cluster" in finding["text"]
    assert finding["advice"] == f"dllama inference --mode privatelora --workers {worker.address} uses it"


@pytest.mark.parametrize(
    "options, said",
    [
        (("--device", "auto", "--memory", "2GB"), "--memory is for a worker of a cluster: "),
        (("--device", "cpu", "--memory", "2GB", "--workers", "a"), "--memory is for a worker of a cluster: "),
        (("--device", "cuda", "--cache-limit", "2GB"), "--cache-limit is for a worker of a cluster: "),
        (("--max-edges", "8"), "--max-edges is for the cloud of PrivateLoRA: it needs --device"),
        (("--unpack", "f16"), "--unpack is for a cloud that computes with CUDA: it needs --device cuda or auto"),
        (("--device", "cpu", "--unpack", "f16"), "--unpack is for a cloud that computes with CUDA: "),
        (("--kv-float-type", "f16"), "--kv-float-type is for a cloud that computes on the CPU: "),
        (("--device", "cuda", "--buffer-float-type", "f32"), "--buffer-float-type is for a cloud that computes on"),
    ],
)
def test_options_without_an_effect(options, said):
    run = ("worker", "--host", "127.0.0.1", "--port", "0", "--insecure", "--model", "model.m")
    assert said in fails(*run, *options, status=2)


def test_what_a_cloud_cannot_start_with(embedded, adapter, tmp_path):
    run = ("worker", "--host", "127.0.0.1", "--port", "0", "--insecure", "--nthreads", "1")
    assert "--device needs --model with it: edges send no weights" in fails(*run, "--device", "cpu", status=2)
    assert "--adapter is for the cloud of PrivateLoRA: it needs --device" in fails(*run, "--adapter", "x", status=2)
    assert "--workers is for a cloud over several devices: it needs --device cpu" in fails(
        *run, "--model", embedded.model, "--device", "auto", "--workers", "a", status=2
    )
    cpu = (*run, "--device", "cpu", "--model", embedded.model)
    assert "over several devices makes A and B out of seeds only" in fails(
        *cpu, "--workers", "a", "b", "--adapter", "x", status=2
    )
    assert "--ratios is for a cloud over several devices" in fails(*cpu, "--ratios", "1:1", status=2)
    assert fails(*cpu, "--workers", "127.0.0.1:1", "--ratios", "1:1:1") == (
        "3 ratios for this machine and 1 worker: each needs one, this machine's first"
    )
    here = (*cpu, "--adapter")
    swapped = adapter / EDGE_FILE
    assert fails(*here, swapped) == (
        f"{swapped}: this is the edge's half (M), where the cloud's half (A and B) belongs"
    )
    write_adapter(tmp_path, *strong_halves(CONFIG))
    assert fails(*here, tmp_path / CLOUD_FILE) == (
        f"{tmp_path / CLOUD_FILE}: for a model of 2 layers, and this one has 4"
    )
