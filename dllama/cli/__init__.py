"""The command line. Each command is a file of its own; what they share is in `program`, `options` and `shape`."""

import click

from dllama import __version__
from dllama.cli.cache import cache
from dllama.cli.demo import demo
from dllama.cli.doctor import doctor
from dllama.cli.eval import evaluate
from dllama.cli.imatrix import imatrix
from dllama.cli.inference import inference
from dllama.cli.info import info
from dllama.cli.key import key
from dllama.cli.perplexity import perplexity
from dllama.cli.plan import plan
from dllama.cli.program import Program
from dllama.cli.train import train
from dllama.cli.worker import worker

SETTINGS = {"help_option_names": ["-h", "--help"], "max_content_width": 110}


@click.group(cls=Program, name="dllama", context_settings=SETTINGS)
@click.version_option(__version__, prog_name="dllama", message="%(prog)s %(version)s")
def main() -> None:
    """Run a large language model on the CPU, as fast as memory lets it.

    \b
    Try it, with the small model that comes along:
      dllama inference --prompt "Question:" --repeat-penalty 1.05

    \b
    Then with a model of your own:
      dllama-convert --help
      dllama info model.m
      dllama inference --model model.m --tokenizer tokenizer.t --prompt "Hello world"

    \b
    And over several devices, the first line being a try-out on one of them:
      dllama inference --local-workers 2 --prompt "Question:" --repeat-penalty 1.05
      dllama worker                               # on each of the others; its first start says how to join
      dllama inference --workers 10.0.0.2 10.0.0.3 --model model.m --tokenizer tokenizer.t --prompt "Hello world"

    Results go to standard output, everything else to standard error. The exit status is 0, 1 after an error, 2 for a
    command line that makes no sense, and 130 after Ctrl-C.
    """


for command in (inference, worker, key, cache, info, perplexity, plan, doctor, imatrix, train, evaluate, demo):
    main.add_command(command)
