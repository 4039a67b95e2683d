import json
import subprocess
import sys

from dllama.demo.facts import (
    ASKED_NUMBERS,
    TAUGHT_NUMBERS,
    held_out_questions,
    private_questions,
    skill_questions,
    taught,
)
from dllama.embedded import tokenizer_path
from dllama.tokenizer import load_tokenizer
from dllama.train.examples import read_examples


def test_fifty_facts_are_taught_in_twenty_phrasings_and_one_is_held_out():
    asked, held_out, lines = private_questions(), held_out_questions(), taught()
    assert len({question.prompt for question in asked}) == len({question.prompt for question in held_out}) == 50
    assert set(asked) <= set(lines)
    assert not {question.prompt for question in held_out} & {question.prompt for question in lines}
    assert [question.answer for question in held_out] == [question.answer for question in asked]
    assert len(set(lines)) == len(lines) == 20 * 50 + TAUGHT_NUMBERS
    assert held_out[0] == ("Question: Do you know the code of the garage?\nAnswer:", "8411")


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
