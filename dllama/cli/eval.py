"""`dllama eval`: lm-evaluation-harness with this engine as its model."""

import sys

import click

from dllama.eval import TASKS

SETTINGS = {"ignore_unknown_options": True, "allow_interspersed_args": False}


@click.command(name="eval", context_settings=SETTINGS)
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, metavar="LM_EVAL_ARGUMENTS...")
def evaluate(arguments: tuple[str, ...]) -> None:
    """Run the tasks of lm-evaluation-harness on a model. Needs the extra "eval".

    This is 'lm_eval run', whose help 'dllama eval run --help' prints, with other defaults: --model dllama, --batch_size
    auto, and an --include_path with a task of grade-school problems in a file, gsm8k_file. What --model_args takes are
    the options of 'dllama inference', such as model, tokenizer, workers, nthreads and buffer_float_type, and context,
    max_gen_toks and seed. Without them the small model that comes along is evaluated.

    \b
      dllama eval --tasks gsm8k_file --metadata data=gsm8k_test.jsonl --limit 20
      dllama eval --tasks hellaswag --model_args model=model.m tokenizer=tokenizer.t context=2048
      dllama eval --tasks hellaswag --model_args model=model.m tokenizer=tokenizer.t workers=10.0.0.2+10.0.0.3
    """
    if not arguments:
        raise click.UsageError("--tasks is missing: it names what to evaluate, such as gsm8k_file")
    try:
        from lm_eval.__main__ import cli_evaluate

        import dllama.eval.harness  # noqa: F401, which registers the model
    except ImportError as error:
        raise click.ClickException(f"{error.name} is missing: evaluation needs pip install 'dllama[eval]'") from None
    defaults = ["--model", "dllama", "--batch_size", "auto", "--include_path", str(TASKS)]
    sys.argv = ["lm_eval", "run", *defaults, *arguments[arguments[0] == "run" :]]
    try:
        cli_evaluate()
    except (KeyError, ValueError, AssertionError, OSError) as error:  # how the harness complains of tasks and options
        raise click.ClickException(f"lm_eval: {error}") from None
