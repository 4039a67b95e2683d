"""Problems in the form of GSM8K, from a file of the user's, as a data set for the harness."""

import json
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict

import dllama.eval.harness  # noqa: F401 - which registers the model: the harness itself looks for no entry points
from dllama.errors import DllamaError, FileError, FormatError
from dllama.formats.files import open_regular

FORM = '{"question": "...", "answer": "... #### 42"}'


def load_problems(data: str | None = None, examples: str | None = None, **_) -> DatasetDict:
    """The splits "test", from the file ``data``, and "train", from the file ``examples``: problems to show the model
    first, for ``--num_fewshot``, none without it. The harness passes its ``--metadata``, and model arguments, which are
    of no use here.

    Raises DllamaError without data, FileError (FormatError) for files that hold something else.
    """
    if data is None:
        raise DllamaError("the task has no problems: --metadata data=FILE.jsonl says where they are")
    return DatasetDict(test=_read(data), train=Dataset.from_list([]) if examples is None else _read(examples))


def _read(path: str) -> Dataset:
    problems = list(_problems(Path(path)))
    if not problems:
        raise FileError(path, "holds no problems")
    return Dataset.from_list(problems)


def _problems(path: Path) -> Iterator[dict[str, str]]:
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            try:
                values = json.loads(line)
                question, answer = values["question"], values["answer"]
                is_problem = isinstance(question, str) and isinstance(answer, str) and "####" in answer
            except (ValueError, RecursionError, TypeError, KeyError):
                is_problem = False
            if not is_problem:
                raise FormatError(path, f"line {number} is not {FORM}")
            yield {"question": question, "answer": answer}
