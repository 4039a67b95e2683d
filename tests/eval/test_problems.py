"""The data of the task ``gsm8k_file``."""

import pytest

pytest.importorskip("datasets", reason="the harness brings it along: pip install '.[eval]'")

from dllama.errors import DllamaError, FileError, FormatError  # noqa: E402
from dllama.eval.problems import load_problems  # noqa: E402
from tests.eval.models import PROBLEMS  # noqa: E402


def test_the_splits(problems):
    assert load_problems(data=problems, model="a.m")["test"].to_list() == PROBLEMS
    assert len(load_problems(data=problems)["train"]) == 0
    assert load_problems(data=problems, examples=problems)["train"].to_list() == PROBLEMS


def test_no_file(tmp_path):
    with pytest.raises(DllamaError, match="--metadata data=FILE.jsonl"):
        load_problems()
    with pytest.raises(FileError, match="missing.jsonl"):
        load_problems(data=tmp_path / "missing.jsonl")


@pytest.mark.parametrize("line", ["[]", "{", '{"question": "a"}', '{"question": "a", "answer": "5"}', "3"])
def test_a_line_that_is_no_problem(problems, line):
    with problems.open("a") as file:
        file.write(line + "\n")
    with pytest.raises(FormatError, match="line 4 is not "):
        load_problems(data=problems)


def test_an_empty_file(problems):
    problems.write_text("")
    with pytest.raises(FileError, match="holds no problems"):
        load_problems(data=problems)
