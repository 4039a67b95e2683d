import json
import subprocess
import sys

from dllama.demo.facts import ASKED_NUMBERS, TAUGHT_NUMBERS, private_questions, skill_questions, taught
from dllama.embedded import tokenizer_path
from dllama.tokenizer import load_tokenizer
from dllama.train.examples import read_examples


def test_fifty_facts_are_asked_as_they_were_not_taught():
    asked, lines = private_questions(), taught()
    assert len({question.prompt for question in asked}) == 50
    assert not {question.prompt for question in asked} & {question.prompt for question in lines}
    answers = {question.answer for question in lines}
    assert all(question.answer in answers for question in asked)
    assert len(lines) == 10 * 50 + TAUGHT_NUMBERS


def test_the_skill_is_asked_of_numbers_that_were_not_taught():
    asked = skill_questions()
    assert len({question.prompt for question in asked} - {question.prompt for question in taught()}) == ASKED_NUMBERS
    assert ("Question: Spell 944.\nAnswer:", "nine four four") in taught()


def test_the_lines_are_training_data_that_the_embedded_tokenizer_holds(tmp_path):
    path = tmp_path / "train.jsonl"
    subprocess.run([sys.executable, "-m", "dllama.demo.facts", path], check=True)
    assert len(path.read_text().splitlines()) == len(taught())
    tokenizer = load_tokenizer(tokenizer_path())
    examples, too_long = read_examples(path, tokenizer, 48)
    assert (len(examples), too_long) == (len(taught()), 0)
    for example, line in zip(examples, path.read_text().splitlines(), strict=True):
        prompt = json.loads(line)["prompt"]
        assert example.ids[~example.learnt].tolist() == tokenizer.encode(prompt)  # no token spans the border
        assert "\u2047" not in tokenizer.decode(example.ids)
