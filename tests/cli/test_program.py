"""Help, version, exit codes and what becomes of errors, whatever the command."""

import subprocess
import sys

import pytest

import dllama
from tests.cli.program import ROOT, command, fails, succeeds

NAMES = ("inference", "worker", "key", "cache", "info", "perplexity", "plan", "imatrix", "train")


def test_version():
    assert succeeds("--version") == f"dllama {dllama.__version__}\n"


@pytest.mark.parametrize("args", [(), ("--help",), ("-h",)])
def test_help_shows_a_first_command_and_every_command(args):
    text = succeeds(*args)
    assert 'dllama inference --prompt "' in text
    assert "dllama inference --local-workers 2 " in text
    for name in NAMES:
        assert f"\n  {name} " in text


def test_help_needs_no_compiler_and_no_network():
    code = "import sys, dllama.cli; print(*(name for name in ('numba', 'zmq') if name in sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).stdout == b"\n"


@pytest.mark.parametrize("name", NAMES)
def test_help_of_a_command_has_examples(name):
    assert f"\n    dllama {name} " in succeeds(name, "--help")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (("convert",), "No such command 'convert'; see 'dllama --help'"),
        (("info",), "Missing argument 'FILE'; see 'dllama info --help'"),
        (("info", "a", "--fast"), "No such option '--fast'; see 'dllama info --help'"),
        (("info", "a", "--context", "1,x"), "'1,x' is not a list of positive numbers"),
        (("info", "a", "--nodes", "0"), "'0' is not a list of positive numbers"),
        (("inference", "--prompt", "a", "--steps", "0"), "--steps"),
        (("inference", "--prompt", "a", "--nthreads", "none"), "--nthreads"),
        (("inference", "--prompt", "a", "--nthreads", "100000"), "--nthreads"),
        (("inference", "--prompt", "a", "--temperature", "-1"), "temperature is -1.0: it must be 0 or more"),
        (("inference", "--prompt", "a", "--topp", "1.5"), "top_p is 1.5"),
        (("inference", "--prompt", "a", "--kv-float-type", "q4"), "'q4' is not one of 'f16', 'f32', 'q80'"),
        (("inference",), "either --prompt or --prompt-file"),
        (("inference", "--prompt", "a", "--prompt-file", "b"), "either --prompt or --prompt-file"),
        (("inference", "--prompt", "a", "--model", "a.m"), "--model needs --tokenizer with it"),
        (("inference", "--prompt", "a", "--tokenizer", "a.t"), "--tokenizer needs --model with it"),
        (("inference", "--prompt", "a", "--ratios", "1:1"), "--ratios is for a cluster: it needs --workers or --local"),
        (("inference", "--prompt", "a", "--insecure"), "--insecure is for a cluster"),
        (("inference", "--prompt", "a", "--key-file", "k"), "--key-file is for a cluster"),
        (("inference", "--prompt", "a", "--workers", "b", "c", "--local-workers", "1"), "either --workers or --local"),
        (("inference", "--prompt", "a", "--workers", "b", "--step-timeout", "0"), "--step-timeout"),
        (("inference", "--prompt", "a", "--workers", ","), "--workers names none"),
        (("inference", "--prompt", "a", "--workers"), "'--workers' requires an argument"),
        (("worker", "--port", "65536"), "--port"),
        (("perplexity",), "--file"),
        (("perplexity", "--file", "setup.cfg", "--context", "8", "--stride", "9"), "--stride 9 would skip tokens"),
    ],
)
def test_a_command_line_without_sense_exits_with_2(args, message):
    assert message in fails(*args, status=2)


def test_output_that_cannot_be_written_is_an_error():
    with open("/dev/full", "wb") as full:
        result = subprocess.run(command("--version"), cwd=ROOT, stdout=full, stderr=subprocess.PIPE)
    assert result.returncode == 1
    assert result.stderr.decode().startswith("dllama: error: cannot write the output: ")
    assert len(result.stderr.splitlines()) == 1


def test_a_closed_output_is_an_error():
    result = subprocess.run(["sh", "-c", '"$@" >&-', "sh", *command("--version")], cwd=ROOT, capture_output=True)
    assert result.returncode == 1
    assert result.stderr == b"dllama: error: cannot write the output: standard output is closed\n"


def test_a_reader_that_goes_away_is_no_error():
    process = subprocess.Popen(command("--help"), cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.close()  # before the program has started up
    assert process.stderr.read() == b""
    process.wait()
