"""How a program starts: Ctrl-C ends it without a word while what it is made of is still being imported."""

import importlib
import signal


def _start(module: str, **options) -> None:
    catches = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not where the shell has it ignored
    if catches:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    main = importlib.import_module(module).main
    if catches:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    main(**options)


def dllama(**options) -> None:
    """The script of this name; ``options``: as of a command's ``main``."""
    _start("dllama.cli", **options)


def convert(**options) -> None:
    """dllama-convert."""
    _start("converter.cli", **options)
