"""Ctrl-C while a program is still being imported."""

import signal
import subprocess
import sys

import pytest

PIPES = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
SLOW = """
import importlib, signal, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # background jobs ignore it
def slow(name):
    print(name, flush=True)
    time.sleep(60)
importlib.import_module = slow
"""


@pytest.mark.parametrize("name, module", [("dllama", "dllama.cli"), ("convert", "converter.cli")])
def test_ctrl_c_ends_it_quietly(name, module):
    script = f"{SLOW}from dllama.start import {name}; {name}()"
    with subprocess.Popen([sys.executable, "-c", script], **PIPES, text=True) as process:
        assert process.stdout.readline() == f"{module}\n"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == -signal.SIGINT
    assert errors == ""


def test_the_shell_has_it_ignored():
    """As for a command with & in a script: it goes on."""
    script = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_IGN); sys.argv[1:] = ['--version']\n"
    script += "import atexit; atexit.register(lambda: print(signal.getsignal(signal.SIGINT) is signal.SIG_IGN))\n"
    script += "from dllama.start import dllama; dllama()"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True)
    assert run.stdout.decode().endswith("True\n") and run.returncode == 0
