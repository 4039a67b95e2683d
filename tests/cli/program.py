"""Running the program, as a user does."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from dllama.cli import main
from tests.forks import FORKS

ROOT = Path(__file__).parents[2]
STREAMS = {"stdin": os.O_RDONLY, "stdout": os.O_WRONLY | os.O_CREAT, "stderr": os.O_WRONLY | os.O_CREAT}
SECONDS = 300


def command(*args) -> list[str]:
    """What starts it from scratch, for tests that have their own pipes or look at the start itself."""
    return [sys.executable, "-m", "dllama", *map(str, args)]


def dllama(*args, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess:
    """Run the program to its end, in a process that has its imports behind it; stdout and stderr as text."""
    args = [str(arg) for arg in args]
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "stdin").write_bytes(stdin)
        process = FORKS.Process(target=_run, args=(args, folder, os.environ | environment))
        process.start()
        process.join(SECONDS)
        if process.exitcode is None:
            process.kill()
            raise AssertionError(f"dllama {' '.join(args)}: still running after {SECONDS} s")
        output = [Path(folder, name).read_text() for name in ("stdout", "stderr")]
    return subprocess.CompletedProcess(args, process.exitcode, *output)


def _run(args: list[str], folder: str, environment: dict[str, str]) -> None:
    """What the forked process does."""
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    for descriptor, (name, flags) in enumerate(STREAMS.items()):
        os.dup2(os.open(Path(folder, name), flags), descriptor)
    sys.stdin = open(0)  # in place of the one that multiprocessing has closed
    main(args)


def succeeds(*args, **options) -> str:
    """What the program prints on standard output; it has to exit with 0."""
    result = dllama(*args, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fails(*args, status: int = 1, **options) -> str:
    """The error in the last line on standard error; the program has to exit with `status` and print no result."""
    return error(dllama(*args, **options), status)


def error(result: subprocess.CompletedProcess, status: int = 1) -> str:
    """The error of a program that had to exit with `status`."""
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    *before, last = result.stderr.splitlines()
    assert last.startswith("dllama: error: ")
    assert not any(line.startswith(("Traceback", "dllama: error")) for line in before)
    return last.removeprefix("dllama: error: ")
