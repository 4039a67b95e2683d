"""How the program ends: exit codes, and errors in one line."""

import os
import sys
from collections.abc import Sequence

import click

from dllama.errors import DllamaError

ERROR, USAGE, INTERRUPTED = 1, 2, 130


class Program(click.Group):
    """A group whose errors are one line on standard error, "NAME: error: ..."; exit codes as in the help text."""

    def main(self, args: Sequence[str] | None = None, prog_name: str | None = None, **extra) -> None:
        args = sys.argv[1:] if args is None else args
        if sys.stdout is None:
            sys.exit(self._complain("cannot write the output: standard output is closed", ERROR))
        sys.stdout.reconfigure(errors="replace")  # generated text on a terminal that is not UTF-8
        try:
            status = super().main(args or ["--help"], prog_name or self.name, **(extra | {"standalone_mode": False}))
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else self.name
            status = self._complain(f"{error.format_message().rstrip('.')}; see '{command} --help'", USAGE)
        except click.ClickException as error:
            status = self._complain(error.format_message(), ERROR)
        except DllamaError as error:
            status = self._complain(str(error), ERROR)
        except MemoryError as error:
            status = self._complain(f"not enough memory: {error}", ERROR)
        except click.Abort:  # what click makes of Ctrl-C
            status = INTERRUPTED
        except OSError as error:  # what is read and written has errors of its own, so this is standard output
            _drop_output()
            status = self._complain(f"cannot write the output: {error.strerror}", ERROR)
        sys.exit(status)

    def _complain(self, message: str, status: int) -> int:
        prefix = click.style(f"{self.name}: error:", fg="red", bold=True)  # echo drops colours but on a terminal
        click.echo(f"{prefix} {' '.join(message.split())}", err=True)
        return status


def _drop_output() -> None:
    """Let what is still buffered vanish, so that Python does not fail over it once more when it exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
