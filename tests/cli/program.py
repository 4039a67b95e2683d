"""Running the real program, as a user does."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def command(*args) -> list[str]:
    return [sys.executable, "-m", "dllama", *map(str, args)]


def dllama(*args, stdin: bytes = b"", **environment: str) -> subprocess.CompletedProcess:
    """Run the program to its end; stdout and stderr as text."""
    result = subprocess.run(
        command(*args), cwd=ROOT, input=stdin, capture_output=True, env=os.environ | environment, timeout=300
    )
    result.stdout, result.stderr = result.stdout.decode(), result.stderr.decode()
    return result


def succeeds(*args, **options) -> str:
    """What the program prints on standard output; it has to exit with 0."""
    result = dllama(*args, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def fails(*args, status: int = 1, **options) -> str:
    """The error in the last line on standard error; the program has to exit with `status` and print no result."""
    result = dllama(*args, **options)
    assert result.returncode == status, result.stderr
    assert result.stdout == ""
    *before, last = result.stderr.splitlines()
    assert last.startswith("dllama: error: ")
    assert not any(line.startswith(("Traceback", "dllama: error")) for line in before)
    return last.removeprefix("dllama: error: ")
