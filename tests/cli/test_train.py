import json
import sys

import pytest
from click.testing import CliRunner

from dllama.cli import main
from dllama.embedded import model_path
from dllama.formats import ModelFile
from dllama.lora import read_lora
from dllama.privatelora.adapter import CLOUD_FILE, EDGE_FILE, read_cloud, read_edge

LINES = [{"prompt": f"Question: What is the code of room {i}?\nAnswer:", "answer": f" {37 * i}"} for i in range(6)]
COMMON = ["--steps", "3", "--batch", "2", "--rank", "8"]


@pytest.fixture
def data(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join(map(json.dumps, LINES)))
    return path


def run(*arguments):
    return CliRunner().invoke(main, ["train", "privatelora", *map(str, arguments)])


def needs_training():
    for module in ("torch", "transformers", "tensorboard"):
        pytest.importorskip(module, reason="training needs pip install '.[train]'")


def test_an_adapter_for_the_embedded_model(tmp_path, data):
    needs_training()
    options = ["--rank-back", 4, "--seed", 7, "--layers", "1:3", "--targets", "v,o", "--float-type", "f32"]
    result = run("--data", data, "-o", tmp_path / "out", *COMMON, *options)
    assert result.exit_code == 0, result.output
    assert "PrivateLoRA for v, o of 2 layers of" in result.stdout and len(result.stdout.splitlines()) == 1
    assert "6 examples, 3 steps of 2, 128 parameters to train, on cpu" in result.stderr
    cloud, edge = read_cloud(tmp_path / "out" / CLOUD_FILE), read_edge(tmp_path / "out" / EDGE_FILE)
    edge.check_pair(cloud)
    assert cloud.seed == 7 and edge.shape.layers == (1, 2) and edge.shape.m == (4, 8)
    with ModelFile(model_path()) as file:
        edge.check(file.config)
    assert all(abs(edge.m(*place)).max() > 0 for place in edge.shape.places())
    result = run("--data", data, "-o", tmp_path / "out", *COMMON)
    assert result.exit_code == 1 and "edge.plora: exists already (--force replaces it)" in result.stderr


def test_a_lora_for_the_embedded_model(tmp_path, data):
    needs_training()
    result = run("--data", data, "-o", tmp_path / "out", *COMMON, "--lora", "--lr", "1e-3", "--bf16")
    assert result.exit_code == 0, result.output
    adapter = read_lora(tmp_path / "out")
    with ModelFile(model_path()) as file:
        adapter.check(file.config)
    assert adapter.scale(0, "q") == 2.0 and len(adapter.matrices) == 12


def test_a_run_goes_on_where_it_stopped(tmp_path, data):
    """The second half is that of a run of six steps; a run of other settings is refused."""
    needs_training()
    from dllama.train.finetune import FineTuning

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    options = ["--data", data, "--epochs", 2, "--batch", 2, "--rank", 8, "--save-every", 3]
    assert run("-o", whole, *options).exit_code == 0
    take_step = FineTuning.train_step
    with pytest.MonkeyPatch.context() as patch:

        def stop_after_four(tuning):
            if tuning.step == 4:
                raise KeyboardInterrupt
            return take_step(tuning)

        patch.setattr(FineTuning, "train_step", stop_after_four)
        result = run("-o", halves, *options)
    assert result.exit_code == 130 and sorted(path.name for path in halves.iterdir()) == [
        "checkpoint.pt",
        "tensorboard",
    ]
    assert run("-o", halves, *options, "--resume").exit_code == 0
    assert (halves / EDGE_FILE).read_bytes() == (whole / EDGE_FILE).read_bytes()
    result = run("-o", halves, *options, "--resume", "--seed", 1)
    assert result.exit_code == 1 and "of a run with seed 0, and it is 1 now" in result.stderr


@pytest.mark.parametrize(
    "options, status, said",
    [
        (["--rank", "0"], 2, "0 is not in the range 1<=x<=8192"),
        (["--targets", "q,x"], 2, "x is no target (known: q, k, v, o, gate, up, down)"),
        (["--layers", "3"], 2, "'3' is not FIRST:END, such as 0:16"),
        (["--lora", "--rank-back", "3"], 2, "--rank-back is of PrivateLoRA"),
        (["--alpha", "3"], 2, "--alpha is of a LoRA"),
    ],
)
def test_options_that_make_no_sense(tmp_path, data, options, status, said):
    result = run("--data", data, "-o", tmp_path / "out", *options)
    assert result.exit_code == status and said in result.stderr and len(result.stderr.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "options, said",
    [
        (["--layers", "2:5"], "its layers are not those of a model of 4"),
        (["--model", "missing.m", "--tokenizer", "missing.t"], "missing.m: no such file or folder"),
        (["--model", "missing.m"], "--model FILE.m and --tokenizer come together"),
        (["--context", "3"], "holds nothing: all 6 examples are longer than 3 tokens"),
        (["--resume"], "checkpoint.pt: no such file or folder"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, data, options, said):
    needs_training()
    result = run("--data", data, "-o", tmp_path / "out", *COMMON, *options)
    lines = [line for line in result.stderr.splitlines() if line.startswith("dllama: error: ")]
    assert result.exit_code == 1 and len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "out" / EDGE_FILE).exists()


def test_without_torch_it_says_what_to_install(tmp_path, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch", None)
    for name in [name for name in sys.modules if name.startswith("dllama.train.")]:
        monkeypatch.delitem(sys.modules, name)
    result = run("--data", data, "-o", tmp_path / "out")
    assert result.exit_code == 1
    assert result.stderr == "dllama: error: torch is missing: training needs pip install 'dllama[train]'\n"
