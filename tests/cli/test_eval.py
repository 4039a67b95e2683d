"""`dllama eval`: the harness's command line with this engine as its model."""

import json
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.cli.program import ROOT, command, error, fails, succeeds

OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
with_the_harness = pytest.mark.skipif(find_spec("lm_eval") is None, reason="the harness: pip install '.[eval]'")


@pytest.fixture
def problems(tmp_path):
    path = tmp_path / "problems.jsonl"
    problem = {"question": "Tom has 3 apples and buys 4 more. How many apples?", "answer": "3 + 4 = 7\n#### 7"}
    path.write_text(f"{json.dumps(problem)}\n" * 2)
    return path


@pytest.fixture(scope="module")
def offline(tmp_path_factory) -> dict[str, str]:
    """An environment with the harness that is installed, but without the tasks of its own, 14,000 files that it reads
    at each start before it does anything else."""
    (installed,) = map(Path, find_spec("lm_eval").submodule_search_locations)
    without = tmp_path_factory.mktemp("harness") / "lm_eval"
    (without / "tasks").mkdir(parents=True)
    for path in (*installed.iterdir(), *installed.glob("tasks/*.py")):
        if path != installed / "tasks":
            (without / path.relative_to(installed)).symlink_to(path)
    paths = str(without.parent), os.environ.get("PYTHONPATH", "")
    return os.environ | OFFLINE | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}


@with_the_harness
def test_the_task_that_comes_along(problems, tmp_path):
    arguments = "--tasks", "gsm8k_file", "--metadata", f"data={problems}", "--gen_kwargs", "max_gen_toks=8"
    table = succeeds("eval", *arguments, "--model_args", "nthreads=1", "--output_path", tmp_path / "out", **OFFLINE)
    assert "flexible-extract" in table and "strict-match" in table
    (path,) = tmp_path.glob("out/**/results*.json")
    results = json.loads(path.read_text())
    assert results["config"]["model"] == "dllama"
    assert results["n-samples"]["gsm8k_file"] == {"original": 2, "effective": 2}
    assert 0 <= results["results"]["gsm8k_file"]["exact_match,strict-match"] <= 1


@with_the_harness
def test_the_harness_s_own_command(problems, tmp_path, offline):
    """It reads no entry points: the task that comes along brings the model with it."""
    task = ROOT / "dllama" / "eval" / "tasks" / "gsm8k_file.yaml"
    arguments = ["--model", "dllama", "--model_args", "nthreads=1", "--tasks", task, "--metadata", f"data={problems}"]
    arguments += ["--gen_kwargs", "max_gen_toks=8", "--limit", "1", "--output_path", tmp_path / "out"]
    run = [sys.executable, "-m", "lm_eval", *map(str, arguments)]
    result = subprocess.run(run, cwd=ROOT, env=offline, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    (path,) = tmp_path.glob("out/**/results*.json")
    assert json.loads(path.read_text())["n-samples"]["gsm8k_file"] == {"original": 2, "effective": 1}


@with_the_harness
@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--model_args", "modle=a.m"], "model_args: No such option"),
        (["--tasks", "no_such_task"], "no_such_task"),
        (["--metadata", "data=missing.jsonl"], "missing.jsonl: "),
    ],
)
def test_mistakes_take_one_line(arguments, message, offline):
    run = command("eval", "--tasks", "gsm8k_file", *arguments)
    assert message in error(subprocess.run(run, cwd=ROOT, env=offline, capture_output=True, text=True))


def test_nothing_to_evaluate():
    assert "--tasks is missing" in fails("eval", status=2)


@pytest.mark.skipif(find_spec("lm_eval") is not None, reason="the harness is installed")
def test_without_the_harness():
    assert fails("eval", "--tasks", "gsm8k_file") == "lm_eval is missing: evaluation needs pip install 'dllama[eval]'"
