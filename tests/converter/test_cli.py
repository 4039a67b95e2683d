import os
import signal
import struct
import subprocess
import sys
import time

import pytest
from click.testing import CliRunner

from converter.cli import main
from converter.gguf_file import read_gguf
from dllama.formats import FloatType, ModelFile
from dllama.tokenizer import load_tokenizer
from tests.converter.checkpoints import LLAMA, random_weights, write, write_gguf, write_meta, write_sparse
from tests.converter.torch_files import archive
from tests.tokenizer.models import train


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    return write(tmp_path_factory.mktemp("cli") / "checkpoint", LLAMA, random_weights(LLAMA))


def run(*arguments):
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


def test_hf(tmp_path, checkpoint):
    result = run("hf", checkpoint, "--weights-float-type", "q80", "--seq-len", 64, "-o", tmp_path / "a.m")
    assert result.exit_code == 0
    assert "a.m: " in result.stdout and "from a Hugging Face folder, llama, 2 layers, q80, context 64" in result.stdout
    assert result.stderr.splitlines()[-1].startswith("Writing a.m: 100 %, ")
    with ModelFile(tmp_path / "a.m") as file:
        assert (file.config.weight_type, file.config.seq_len) == (FloatType.Q80, 64)


@pytest.mark.parametrize(
    "words", [["{}"], ["{}", "q80"], ["model", "{}", "Q80"], ["{}", "--weights-float-type", "q80"]]
)
def test_a_path_alone_is_recognised(tmp_path, monkeypatch, words):
    """The form of the first releases: the folder, the type, and a file here named for both."""
    monkeypatch.chdir(tmp_path)
    write_meta(tmp_path / "llama-2-7b", LLAMA, random_weights(LLAMA), 2)
    result = run(*(word.format(tmp_path / "llama-2-7b") for word in words))
    kind = "q40" if len(words) == 1 else "q80"
    assert result.exit_code == 0, result.stderr
    assert result.stdout.startswith(f"dllama_model_llama-2-7b_{kind}.m: ")
    with ModelFile(f"dllama_model_llama-2-7b_{kind}.m") as file:
        assert file.config.weight_type is FloatType.parse(kind)


def test_a_folder_here_is_taken_by_its_name(tmp_path, monkeypatch, checkpoint):
    monkeypatch.chdir(checkpoint.parent)
    assert run(checkpoint.name, "f16", "-o", tmp_path / "a.m").exit_code == 0


def test_meta(tmp_path):
    folder = write_meta(tmp_path / "meta", LLAMA, random_weights(LLAMA))
    assert run("meta", folder, "--weights-float-type", "f32", "-o", tmp_path / "a.m").exit_code == 0
    with ModelFile(tmp_path / "a.m") as file:
        assert file.config.weight_type is FloatType.F32
    result = run("hf", folder, "-o", tmp_path / "b.m")
    assert (result.exit_code, result.stderr.endswith("config.json: no such file or folder\n")) == (1, True)


def test_gguf(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_gguf(tmp_path / "llama-f16.gguf", LLAMA, random_weights(LLAMA))
    assert run("gguf", path, "--weights-float-type", "q80", "-o", "a.m").exit_code == 0
    assert run(path.name, "q80").exit_code == 0
    assert (tmp_path / "dllama_model_llama-f16_q80.m").read_bytes() == (tmp_path / "a.m").read_bytes()


def test_values_that_became_zero_are_told(tmp_path):
    weights = random_weights(LLAMA)
    weights["model.norm.weight"][:3] = float("nan")
    folder = write(tmp_path / "checkpoint", LLAMA, weights)
    result = run(folder, "-o", tmp_path / "a.m")
    assert result.exit_code == 1
    assert "model.norm.weight has values that are not finite (NaN or infinity) (--allow-non-finite" in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoint"]
    result = run(folder, "-o", tmp_path / "a.m", "--allow-non-finite")
    assert result.exit_code == 0
    assert "model.norm.weight: 3 values were not finite and became 0\n" in result.stderr


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
    out.unlink()
    result = run("hf", checkpoint, "-o", out)
    assert result.stderr == f"dllama-convert: error: {out}.json: exists already (--force replaces it)\n"
    assert not out.exists()


@pytest.mark.parametrize(
    "arguments, reason",
    [
        (["hf", "missing", "-o", "a.m"], "dllama-convert: error: missing: no such file or folder\n"),
        (["meta", "missing", "-o", "a.m"], "dllama-convert: error: missing: no such file or folder\n"),
        (["gguf", "missing", "-o", "a.m"], "dllama-convert: error: missing: no such file or folder\n"),
        (["model", "missing"], "dllama-convert: error: missing: no such file or folder\n"),
        (["./missing", "q40"], "dllama-convert: error: missing: no such file or folder\n"),
        (["tokenizer", "missing", "-o", "a.t"], "dllama-convert: error: missing: no such file or folder\n"),
    ],
)
def test_errors_are_one_line(tmp_path, monkeypatch, arguments, reason):
    monkeypatch.chdir(tmp_path)
    result = run(*arguments)
    assert (result.exit_code, result.stderr) == (1, reason)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("number, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)])
@pytest.mark.parametrize("stage", ["reading", "writing"])
def test_an_interrupted_conversion_leaves_nothing(tmp_path, number, status, stage):
    """A model of a billion weights, interrupted as soon as its file is there, and when the first of it is written."""
    large = {**LLAMA, "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 22, "vocab_size": 32000}
    write_sparse(tmp_path / "checkpoint", large)
    script = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # background jobs ignore it
    script += "signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"  # and nohup a closed terminal
    script += "from converter.cli import main; main()"
    arguments = ["hf", str(tmp_path / "checkpoint"), "-o", str(tmp_path / "a.m")]
    process = subprocess.Popen([sys.executable, "-c", script, *arguments], stderr=subprocess.PIPE, text=True)
    while not any(stage == "reading" or path.stat().st_size for path in tmp_path.glob(".a.m.*.tmp")):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(number)
    _, stderr = process.communicate()
    assert process.returncode == status and "Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_a_closed_terminal_does_not_end_what_nohup_started(tmp_path, checkpoint):
    script = "import os, signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n"
    script += "from converter import cli, convert\nwrite = cli.convert\n"
    script += "cli.convert = lambda *args, **kwargs: (os.kill(os.getpid(), signal.SIGHUP), write(*args, **kwargs))[1]\n"
    command = [sys.executable, "-c", script + "cli.main()", "hf", str(checkpoint), "-o", str(tmp_path / "a.m")]
    assert subprocess.run(command, capture_output=True).returncode == 0


def test_sources_stay_even_if_they_are_to_be_replaced(tmp_path, checkpoint):
    model = train(tmp_path / "tokenizer.model", vocab_size=400)
    gguf = write_gguf(tmp_path / "a.gguf", LLAMA, random_weights(LLAMA))
    assert run("gguf", gguf, "-o", tmp_path / "a.m").exit_code == 0
    (tmp_path / "tokens.bin").symlink_to(model)
    (tmp_path / "tokenizer_config.json").write_text("{}")
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for words in (
        ["gguf", gguf, "-o", gguf],
        ["tokenizer", model, "-o", tmp_path / "tokens.bin"],
        ["tokenizer", tmp_path, "-o", model],
        ["tokenizer", tmp_path / "tokenizer.json", "-o", tmp_path / "tokenizer_config.json"],
        ["to-gguf", tmp_path / "a.m", model, "-o", tmp_path / "a.m"],
        ["to-gguf", tmp_path / "a.m", tmp_path, "-o", model],
    ):
        result = run(*words, "--force")
        assert result.exit_code == 1
        assert (
            result.stderr
            == f"dllama-convert: error: {words[-1]}: is what it would be made from: write to another file\n"
        )
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize("name", ["circle", "x" * 300])
def test_paths_that_lead_nowhere(tmp_path, name):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for words in (["model"], ["hf"], ["meta"], ["gguf"], ["tokenizer"]):
        result = run(*words, tmp_path / name, "-o", tmp_path / "a.m")
        assert result.exit_code == 1 and result.stderr.startswith(f"dllama-convert: error: {tmp_path / name}: ")
        result = run(*words, tmp_path, "-o", tmp_path / name)
        assert result.exit_code == 1 and result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["circle"]


def test_names_that_are_not_utf_8(tmp_path):
    weird = tmp_path / os.fsdecode(b"l\xe9o")
    shape = {**LLAMA, "vocab_size": 400}
    path = write_gguf(weird.with_suffix(".gguf"), shape, random_weights(shape))
    train(tmp_path / "tokenizer.model", vocab_size=400)
    assert run("gguf", path, "-o", weird.with_suffix(".m")).exit_code == 0
    result = run("to-gguf", weird.with_suffix(".m"), tmp_path / "tokenizer.model", "-o", tmp_path / "b.gguf")
    assert result.exit_code == 0, result.stderr
    assert read_gguf(tmp_path / "b.gguf")[0]["general.name"] == "l\ufffdo"


def without_a_shard(folder):
    (folder / "consolidated.01.pth").unlink()


def with_a_truncated_shard(folder):
    path = folder / "consolidated.01.pth"
    path.write_bytes(path.read_bytes()[:-1000])


def with_a_malicious_shard(folder):
    command = f"touch {folder.parent / 'harmed'}".encode()
    pickle = b"\x80\x02}X\x01\x00\x00\x00acposix\nsystem\n(X" + struct.pack("<I", len(command)) + command + b"tRs."
    (folder / "consolidated.01.pth").write_bytes(archive(pickle, {}))


def with_params_of_another_kind(folder):
    (folder / "params.json").write_text('{"dim": 64, "n_layers": 2, "n_heads": 4, "moe": {"num_experts": 8}}')


@pytest.mark.parametrize(
    "damage, reason",
    [
        (without_a_shard, "meta: holds 1 shard, and params.json with the size of the first calls for 2"),
        (with_a_truncated_shard, "meta/consolidated.01.pth: truncated or not a torch checkpoint"),
        (with_a_malicious_shard, "meta/consolidated.01.pth: refused: its pickle asks for posix.system"),
        (with_params_of_another_kind, "meta/params.json: moe is set, and such a model cannot be converted (known: "),
    ],
)
def test_a_bad_checkpoint_is_one_line_and_leaves_nothing(tmp_path, damage, reason):
    folder = write_meta(tmp_path / "meta", LLAMA, random_weights(LLAMA), 2)
    damage(folder)
    result = run(folder, "q40", "-o", tmp_path / "a.m")
    assert result.exit_code == 1 and result.stdout == ""
    assert result.stderr.startswith(f"dllama-convert: error: {tmp_path}/{reason}") and result.stderr.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["meta"]


USAGE_ERRORS = [
    "hf", "hf x -o y --weights-float-type q5", "hf x -o y --seq-len 0", "tokenizer x", "nothing", ". q5",
    ". q40 --weights-float-type q80", ". q80 --imatrix x", ". --reference --imatrix x",
]  # fmt: skip


@pytest.mark.parametrize("arguments", [words.split() for words in USAGE_ERRORS], ids=USAGE_ERRORS)
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


@pytest.mark.parametrize("command", [[], ["model"], ["hf"], ["meta"], ["gguf"], ["tokenizer"]])
def test_help_teaches_by_example(command):
    result = run(*command, "--help")
    assert result.exit_code == 0 and "dllama-convert" in result.stdout.split("Usage", 1)[1].split("\n", 1)[1]
