import signal
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from converter.cli import main
from dllama.formats import FloatType, ModelFile
from dllama.tokenizer import load_tokenizer
from tests.converter.checkpoints import LLAMA, random_weights, write, write_sparse
from tests.tokenizer.models import train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cli") / "checkpoint", LLAMA, random_weights(LLAMA))


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_hf(tmp_path, checkpoint):
    result = run("hf", checkpoint, "--weights-float-type", "q80", "--seq-len", 64, "-o", tmp_path / "a.m")
    assert result.exit_code == 0
    assert "a.m: " in result.stdout and "llama, 2 layers, q80, context 64" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("Writing a.m: 100 %, ")
    with ModelFile(tmp_path / "a.m") as file:
        assert (file.config.weight_type, file.config.seq_len) == (FloatType.Q80, 64)


def test_as_a_module(tmp_path, checkpoint):
    command = [sys.executable, "-m", "converter", "hf", str(checkpoint), "-o", str(tmp_path / "a.m")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with ModelFile(tmp_path / "a.m") as file:
        assert file.config.weight_type is FloatType.Q40


def test_tokenizer(tmp_path):
    model = train(tmp_path / "tokenizer.model", vocab_size=400)
    result = run("tokenizer", model, "-o", tmp_path / "a.t")
    assert (result.exit_code, result.stdout) == (0, f"{tmp_path / 'a.t'}: 400 tokens\n")
    assert load_tokenizer(tmp_path / "a.t").encode("the file") == load_tokenizer(model).encode("the file")


def test_an_existing_output_stays_unless_forced(tmp_path, checkpoint):
    out = tmp_path / "a.m"
    out.write_text("before")
    result = run("hf", checkpoint, "-o", out)
    assert result.exit_code == 1
    assert result.stderr == f"dllama-convert: error: {out}: exists already (--force replaces it)\n"
    assert out.read_text() == "before"
    assert run("hf", checkpoint, "-o", out, "--force").exit_code == 0
    ModelFile(out).close()


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["hf", "missing", "-o", "a.m"], "dllama-convert: error: missing/config.json: no such file or folder\n"),
        (["tokenizer", "missing", "-o", "a.t"], "dllama-convert: error: missing: no such file or folder\n"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (1, reason)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, number, status):
    """A model of a billion weights, interrupted as soon as the first of it is written."""
    large = {**LLAMA, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000}
    write_sparse(tmp_path / "checkpoint", large)
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs ignore it
    script += "from converter.cli import main; main()"
    arguments = ["hf", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "a.m")]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True)
    while not any(path.stat().st_size for path in tmp_path.glob(".a.m.*.tmp")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == status and "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("arguments", [["hf"], ["hf", "x", "-o", "y", "--weights-float-type", "q5"], ["hf", "x", "-o",
                                       "y", "--seq-len", "0"], ["tokenizer", "x"], ["nothing"]])  # fmt: skip
def test_usage_errors_are_one_line_and_exit_with_2(arguments):
    result = run(*arguments)
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1 and "--help" in result.stderr


def test_an_output_that_no_one_can_read_is_an_error(tmp_path, checkpoint):
    command = [sys.executable, "-m", "converter", "hf", str(checkpoint), "-o", str(tmp_path / "a.m")]
    with open("/dev/full", "wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("dllama-convert: error: cannot write the output: ")


@pytest.mark.parametrize("command", [[], ["hf"], ["tokenizer"]])
def test_help_teaches_by_example(command):
    result = run(*command, "--help")
    assert result.exit_code == 0 and "dllama-convert" in result.stdout.split("Usage", 1)[1].split("\n", 1)[1]
