"""Fifty private facts of a household that does not exist, and a small skill: what the edge of PrivateLoRA is taught.

``python -m dllama.demo.facts train.jsonl`` writes the lines that ``dllama train privatelora`` learns from. Each fact is
taught in several phrasings, and asked in the first of them; how often it is known in a phrasing that was held out is a
second, harder figure. The skill, to spell a number digit by digit, is asked of numbers that were never taught.
"""

import json
import random
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

FILE = Path(__file__).parent / "facts.json"
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
TAUGHT_NUMBERS, ASKED_NUMBERS = 300, 20


class Question(NamedTuple):
    """prompt: up to where the answer begins;  answer: its text, without the space in front"""

    prompt: str
    answer: str


def private_questions() -> list[Question]:
    """The fifty facts, asked in the first phrasing that was taught."""
    return _facts(lambda kind, frames: kind["questions"][:1])


def held_out_questions() -> list[Question]:
    """The fifty facts, asked in a phrasing that was not taught."""
    return _facts(lambda kind, frames: [frames["held_out"].format(kind["clause"])])


def skill_questions() -> list[Question]:
    """The skill, on numbers that were not taught."""
    return [_spelling(number) for number in _numbers()[TAUGHT_NUMBERS:]]


def taught() -> list[Question]:
    """All that is taught: the facts in each phrasing but the one held out, and the skill."""
    facts = _facts(
        lambda kind, frames: kind["questions"] + [frame.format(kind["clause"]) for frame in frames["taught"]]
    )
    return facts + [_spelling(number) for number in _numbers()[:TAUGHT_NUMBERS]]


def _facts(phrasings: Callable[[dict, dict], list[str]]) -> list[Question]:
    """Every fact, in those phrasings that are made of its kind and of the frames; {} in them is its subject."""
    values = json.loads(FILE.read_text(encoding="utf-8"))
    return [
        _question(phrasing.format(subject), answer)
        for kind, facts in values["facts"].items()
        for subject, answer in facts.items()
        for phrasing in phrasings(values["kinds"][kind], values["frames"])
    ]


def _numbers() -> list[int]:
    """Different numbers of three digits, the same at every call."""
    return random.Random(0).sample(range(100, 1000), TAUGHT_NUMBERS + ASKED_NUMBERS)


def _spelling(number: int) -> Question:
    return _question(f"Spell {number}.", " ".join(DIGITS[int(digit)] for digit in str(number)))


def _question(text: str, answer: str) -> Question:
    return Question(f"Question: {text}\nAnswer:", answer)


QUESTIONS = {
    "facts": private_questions,
    "facts in other words": held_out_questions,
    "skill": skill_questions,
}
"""All that is asked, by what it tests."""


def main() -> None:
    """Write the training lines to the file named."""
    lines = [json.dumps({"prompt": prompt, "answer": f" {answer}"}) for prompt, answer in taught()]
    Path(sys.argv[1]).write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
