"""`dllama inference` with the embedded model: what it prints and records, and what it refuses."""

import fcntl
import json
import os
import re
import resource
import shutil
import signal
import struct
import subprocess

import pytest

from dllama import Llama, SamplerSettings
from dllama.embedded import model_path
from dllama.formats import ModelFile
from dllama.kernels.team import in_threads
from dllama.lora import write_lora
from tests.cli.conftest import CONFIG
from tests.cli.program import ROOT, command, dllama, error, fails, succeeds
from tests.engine.adapters import random_adapter

PROMPT = "Tom has 3 apples and 4 pears."
GREEDY = ("inference", "--prompt", PROMPT, "--temperature", "0")
AT_RANDOM = ("inference", "--prompt", PROMPT, "--temperature", "1000", "--topp", "1", "--seed", "3")  # no early end

TOKEN_LINE = re.compile(r"🔶 G \d+ ms I \d+ ms T 0 ms S 0 kB R 0 kB (.*)")
PROMPT_LINE = re.compile(r"🔷 P \d+ ms (\d+) tokens (.*)")
AVERAGE = re.compile(r"(Prompt|Generation) +(\d+) tokens +[\d.]+ ms/token +[\d.]+ tokens/s")

STATISTICS = {
    *("prompt_tokens", "generated_tokens", "text", "token_ids", "prefill_ms", "decode_ms", "inference_ms"),
    *("transfer_ms", "sent_bytes", "received_bytes", "load_ms", "peak_rss_bytes", "kernels", "nthreads", "model"),
    *("nodes", "cluster"),
}


@pytest.fixture(scope="module")
def greedy(tmp_path_factory) -> dict:
    """A run of 12 steps at temperature 0: what it printed, and its statistics."""
    path = tmp_path_factory.mktemp("stats") / "run.json"
    result = dllama(*GREEDY, "--steps", "12", "--stats", path)
    assert result.returncode == 0, result.stderr
    return {"stdout": result.stdout, "stderr": result.stderr, "statistics": json.loads(path.read_text())}


def test_lines_are_prompt_tokens_averages(greedy):
    first, *tokens, prompt_average, generation_average = greedy["stdout"].splitlines()
    statistics = greedy["statistics"]
    n_prompt, beginning = PROMPT_LINE.fullmatch(first).groups()
    assert (int(n_prompt), beginning) == (statistics["prompt_tokens"], PROMPT)
    pieces = [TOKEN_LINE.fullmatch(line)[1] for line in tokens]
    assert "".join(pieces).replace("\\n", "\n") == statistics["text"]
    assert AVERAGE.fullmatch(prompt_average).groups() == ("Prompt", str(statistics["prompt_tokens"]))
    assert AVERAGE.fullmatch(generation_average).groups() == ("Generation", "12")


def test_what_was_loaded_is_told_on_standard_error(greedy):
    statistics = greedy["statistics"]
    assert f"{in_threads(statistics['nthreads'])}, {statistics['kernels']} kernels" in greedy["stderr"]
    assert "error" not in greedy["stderr"]


def test_statistics_have_a_value_for_every_token(greedy):
    statistics = greedy["statistics"]
    assert set(statistics) == STATISTICS
    assert statistics["generated_tokens"] == 12
    for name in ("token_ids", "decode_ms", "inference_ms", "transfer_ms", "sent_bytes", "received_bytes"):
        assert len(statistics[name]) == 12
    assert all(0 < i <= d for i, d in zip(statistics["inference_ms"][1:], statistics["decode_ms"][1:], strict=True))
    (node,) = statistics["nodes"]
    assert node["name"] == "root" and statistics["cluster"] is None
    assert node["inference_ms"] == [None, *statistics["inference_ms"][1:]]
    assert statistics["prefill_ms"] > 0
    assert statistics["load_ms"] > 0
    assert statistics["peak_rss_bytes"] > 10**7
    assert statistics["model"]["vocab_size"] > max(statistics["token_ids"])


def test_quiet_prints_the_text_alone(greedy):
    result = dllama(*GREEDY, "--steps", "12", "--quiet")
    assert result.stdout == greedy["statistics"]["text"].removesuffix("\n") + "\n"
    assert result.stderr == ""


def test_a_prompt_from_a_file_or_standard_input_is_the_same_prompt(greedy, tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_text(PROMPT + "\n")
    rest = ("--temperature", "0", "--steps", "12", "--quiet")
    expected = greedy["statistics"]["text"].removesuffix("\n") + "\n"
    assert succeeds("inference", "--prompt-file", path, *rest) == expected
    assert succeeds("inference", "--prompt-file", "-", *rest, stdin=path.read_bytes()) == expected


def test_a_seed_repeats_a_run():
    args = ("inference", "--prompt", PROMPT, "--steps", "24", "--temperature", "1.5", "--topp", "1", "--quiet")
    first, again, other = (succeeds(*args, "--seed", seed) for seed in (1, 1, 2))
    assert first == again != other


def test_steps_beyond_the_context_stop_at_its_end_and_say_so():
    result = dllama(*AT_RANDOM, "--max-seq-len", "24", "--steps", "100000")
    assert result.returncode == 0, result.stderr
    n_prompt = int(PROMPT_LINE.match(result.stdout)[1])
    assert len(TOKEN_LINE.findall(result.stdout)) == 24 - n_prompt + 1  # the last one needs no room
    assert result.stderr.splitlines()[-1] == "stopped at the end of the context of 24 tokens"


def test_ctrl_c_prints_the_averages_so_far_and_writes_the_statistics(tmp_path):
    path = tmp_path / "run.json"
    process = subprocess.Popen(
        command(*AT_RANDOM, "--steps", "100000", "--stats", path),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        bufsize=0,
    )
    with process:
        if hasattr(fcntl, "F_SETPIPE_SZ"):  # so little room that the run waits for its reader long before its end
            fcntl.fcntl(process.stdout, fcntl.F_SETPIPE_SZ, 4096)
        lines = [process.stdout.readline() for _ in range(4)]
        process.send_signal(signal.SIGINT)
        lines += process.stdout.readlines()
        assert process.wait() == 130
        assert b"Traceback" not in process.stderr.read()
    lines = [line.decode().rstrip("\n") for line in lines]
    assert [AVERAGE.fullmatch(line)[1] for line in lines[-2:]] == ["Prompt", "Generation"]
    n_tokens = sum(line.startswith("🔶") for line in lines)
    assert json.loads(path.read_text())["generated_tokens"] == n_tokens == int(AVERAGE.fullmatch(lines[-1])[2])


def test_a_reader_that_goes_away_ends_the_run_silently():
    with subprocess.Popen(
        command(*GREEDY, "--quiet"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        process.stdout.read(1)
        process.stdout.close()
        assert process.stderr.read() == b""


@pytest.mark.parametrize("args", [("--prompt", ""), ("--prompt-file", "-")])
def test_an_empty_prompt(args):
    assert fails("inference", *args) == "the prompt is empty"


def test_a_prompt_longer_than_the_context():
    message = fails("inference", "--prompt", "apples " * 100, "--max-seq-len", "50")
    assert re.search(r"prompt .*\d+ tokens.* 50", message)


def test_a_prompt_that_is_not_text(tmp_path):
    path = tmp_path / "prompt.txt"
    path.write_bytes(b"caf\xe9")
    assert fails("inference", "--prompt-file", path) == f"{path}: not UTF-8 text (byte 3 is 0xe9)"
    assert fails("inference", "--prompt-file", tmp_path) == f"{tmp_path}: a folder, not a file"
    assert fails("inference", "--prompt-file", tmp_path / "x") == f"{tmp_path / 'x'}: no such file or folder"
    assert "not valid Unicode" in fails("inference", "--prompt", os.fsdecode(b"caf\xe9"))


def run_files(model, tokenizer) -> str:
    return fails("inference", "--prompt", PROMPT, "--model", model, "--tokenizer", tokenizer)


def test_files_that_cannot_be_used(embedded, tmp_path):
    missing, text, old, short = (tmp_path / name for name in ("missing.m", "text.m", "old.m", "short.m"))
    text.write_text("not a model")
    old.write_bytes(struct.pack("<10i", 0x00ABCD00, *[1] * 9))
    short.write_bytes(embedded.model.read_bytes()[:-1])
    assert run_files(missing, embedded.tokenizer) == f"{missing}: no such file or folder"
    assert run_files(text, embedded.tokenizer).startswith(f"{text}: not a model")
    assert run_files(old, embedded.tokenizer).startswith(f"{old}: a model with the old header")
    assert run_files(short, embedded.tokenizer).startswith(f"{short}: truncated")
    assert run_files(tmp_path, embedded.tokenizer) == f"{tmp_path}: a folder, not a file"
    assert run_files(embedded.model, missing) == f"{missing}: no such file or folder"
    assert run_files(embedded.model, embedded.model) == f"{embedded.model}: a model, not a tokenizer"


def test_a_tokenizer_of_another_model(small_model, embedded):
    message = run_files(small_model, embedded.tokenizer)
    assert str(embedded.tokenizer) in message
    assert "300" in message


def test_weights_of_another_type():
    message = fails(*GREEDY, "--weights-float-type", "f32")
    assert "q40" in message and "f32" in message


def test_kernels_that_do_not_exist():
    """They are chosen once, at the imports, so the program starts from scratch."""
    environment = os.environ | {"DLLAMA_KERNELS": "mmx"}
    result = subprocess.run(command(*GREEDY), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert error(result).startswith("DLLAMA_KERNELS=mmx: no such kernels")


def test_too_little_memory():
    message = fails(*GREEDY, DLLAMA_MEMORY_LIMIT="151000000")
    assert re.search(r"of memory needed .*\(\d+ bytes\), 151.0 MB available \(151000000 bytes\); ", message)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """A folder with a random adapter for the embedded model."""
    folder = tmp_path_factory.mktemp("adapter")
    with ModelFile(model_path()) as model:
        write_lora(folder, random_adapter(model.config, 0), "embedded")
    return folder


def test_an_adapter(greedy, adapter):
    args = (*GREEDY, "--steps", "12", "--quiet")
    with Llama(adapters={"random": adapter}) as llama:
        pieces = llama.generate(PROMPT, 12, SamplerSettings(temperature=0), adapter="random")
        expected = "".join(piece.text for piece in pieces)
    found = succeeds(*args, "--adapter", adapter)
    assert found == expected.removesuffix("\n") + "\n"
    assert found != succeeds(*args) == greedy["statistics"]["text"].removesuffix("\n") + "\n"


def test_adapters_that_cannot_be_used(adapter, tmp_path):
    def message(folder, *more) -> str:
        return fails(*GREEDY, "--adapter", folder, *more)

    assert message(tmp_path) == f"{tmp_path / 'adapter_config.json'}: no such file or folder"
    other, ranks, bare = (tmp_path / name for name in ("other", "ranks", "bare"))
    write_lora(other, random_adapter(CONFIG, 0), "small")
    assert message(other) == f"{other}: for a model whose down takes 96 values and gives 64, and it is 768 and 288 here"
    for folder in (ranks, bare):
        shutil.copytree(adapter, folder)
    settings = json.loads((ranks / "adapter_config.json").read_text())
    (ranks / "adapter_config.json").write_text(json.dumps(settings | {"r": 0}))
    assert message(ranks) == f"{ranks / 'adapter_config.json'}: r is 0, not a whole number above 0"
    (bare / "adapter_model.safetensors").unlink()
    assert message(bare) == f"{bare / 'adapter_model.safetensors'}: no such file or folder"
    deep = tmp_path / "deep"
    with ModelFile(model_path()) as model:
        write_lora(deep, random_adapter(model.config, 0, layers=(0, 7)), "embedded")
    assert message(deep) == f"{deep}: adds to layer 7, and the model has 4"


def test_statistics_that_cannot_be_written(tmp_path):
    missing = tmp_path / "missing" / "run.json"
    assert fails(*GREEDY, "--stats", missing).startswith(f"{missing}: cannot be written: no such file or folder")
    assert fails(*GREEDY, "--stats", "/dev/full") == "/dev/full: exists and is not a regular file"


def test_statistics_on_a_full_disk_leave_no_file(tmp_path):
    path = tmp_path / "run.json"

    def no_room():  # a limit on the size of files fails as a full disk does
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))

    result = subprocess.run(
        command(*GREEDY, "--steps", "2", "--stats", path), cwd=ROOT, capture_output=True, preexec_fn=no_room
    )
    assert result.returncode == 1
    assert result.stderr.decode().splitlines()[-1].startswith(f"dllama: error: {path}: cannot be written: ")
    assert list(tmp_path.iterdir()) == []
