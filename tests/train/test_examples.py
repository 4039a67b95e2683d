import json

import numpy as np
import pytest

from dllama.embedded import tokenizer_path
from dllama.errors import FileError, ModelError
from dllama.formats.vocabulary import CONTROL, Vocabulary
from dllama.tokenizer import MergeTokenizer, load_tokenizer
from dllama.train.examples import UNLEARNT, Example, collate, read_examples, step_rows, steps_of_epoch

TOKENIZER = load_tokenizer(tokenizer_path())
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{{ eos_token }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def chat_tokenizer(template):
    """A tokenizer of single bytes and three special tokens."""
    special = [b"<|user|>", b"<|assistant|>", b"<|end|>"]
    pieces = [bytes([byte]) for byte in range(256)] + special
    return MergeTokenizer(Vocabulary(pieces, [0.0] * 256 + [CONTROL] * 3, None, (258,), False, template))


def write(folder, *lines):
    path = folder / "train.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def learnt(example):
    return TOKENIZER.decode(example.ids[example.learnt])


def test_answers_alone_are_learnt(tmp_path):
    prompt = "Question: How many apples?\nAnswer:"
    path = write(tmp_path, {"prompt": prompt, "answer": " She has 12 apples."}, "", {"prompt": "", "answer": "Tom"})
    (first, second), too_long = read_examples(path, TOKENIZER, 100)
    assert too_long == 0
    assert first.ids.tolist() == [*TOKENIZER.encode(prompt + " She has 12 apples."), TOKENIZER.eos_ids[0]]
    assert first.ids[~first.learnt].tolist() == TOKENIZER.encode(prompt)
    assert learnt(first) == "She has 12 apples." and first.learnt[-1]
    assert learnt(second) == "Tom" and not second.learnt[0]


def test_a_token_over_the_border_belongs_to_the_answer(tmp_path):
    """ "Answer: " ends in a space that is a part of the answer's first token."""
    ((example,), _) = read_examples(write(tmp_path, {"prompt": "Answer: ", "answer": "the"}), TOKENIZER, 100)
    assert learnt(example) == "the" and example.ids[-2] == TOKENIZER.encode("a the")[-1]


def test_long_examples_are_left_out_and_counted(tmp_path):
    short, long = {"prompt": "a", "answer": "b"}, {"prompt": "a" * 100, "answer": "b"}
    examples, too_long = read_examples(write(tmp_path, short, long, long), TOKENIZER, 20)
    assert (len(examples), too_long) == (1, 2)
    with pytest.raises(FileError, match="holds nothing: all 2 examples are longer than 20 tokens"):
        read_examples(write(tmp_path, long, long), TOKENIZER, 20)


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "train.jsonl: line 2 is not JSON: each line must be a prompt and an answer"),
        ("[]", "line 2 is not a prompt and an answer"),
        ('"x"', "line 2 is not a prompt"),
        ({"prompt": "a"}, "line 2: not a prompt and an answer"),
        ({"prompt": "a", "answer": ""}, "line 2: not a prompt"),
        ({"prompt": 1, "answer": "a"}, "line 2: not a prompt"),
        ({"messages": [{"role": "user"}]}, "line 2: not a prompt"),
        ({"messages": "x"}, "line 2: not a prompt"),
        ({"messages": []}, "line 2: no message of the assistant"),
    ],
)
def test_lines_that_are_no_examples(tmp_path, line, said):
    path = write(tmp_path, {"prompt": "a", "answer": "b"}, line)
    with pytest.raises(FileError, match=said):
        read_examples(path, TOKENIZER, 100)


def test_an_empty_file(tmp_path):
    with pytest.raises(FileError, match="train.jsonl: holds nothing to learn"):
        read_examples(write(tmp_path, ""), TOKENIZER, 100)


CONVERSATION = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "Martha"},
    {"role": "user", "content": "When?"},
    {"role": "assistant", "content": "At 9"},
]


def test_messages_need_a_chat_template(tmp_path):
    with pytest.raises(ModelError, match="the tokenizer has no chat template"):
        read_examples(write(tmp_path, {"messages": CONVERSATION}), TOKENIZER, 100)


def test_what_the_assistant_says_is_learnt(tmp_path):
    pytest.importorskip("transformers", reason="chat templates need transformers: pip install '.[train]'")
    tokenizer = chat_tokenizer(CHAT)
    path = write(tmp_path, {"messages": [*CONVERSATION, {"role": "user", "content": "and then?"}]})
    ((example,), _) = read_examples(path, tokenizer, 100)
    end = tokenizer.eos_ids[0]
    assert example.ids[example.learnt].tolist() == [*tokenizer.encode("Martha"), end, *tokenizer.encode("At 9"), end]
    assert "and then" not in tokenizer.decode(example.ids)
    refusing = chat_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(FileError, match="line 1: the chat template refuses it: roles must alternate"):
        read_examples(path, refusing, 100)
    forgetful = chat_tokenizer("{{ messages[-1].content }}")
    with pytest.raises(FileError, match="line 1: the chat template changes earlier turns"):
        read_examples(path, forgetful, 100)


def test_every_example_once_in_an_epoch():
    steps = steps_of_epoch(10, 4)
    assert steps == 3
    epochs = [np.concatenate([step_rows(10, 4, epoch * steps + i, seed=1) for i in range(steps)]) for epoch in (0, 1)]
    for epoch in epochs:
        assert sorted(epoch) == list(range(10))
    assert not np.array_equal(*epochs)
    assert not np.array_equal(step_rows(10, 4, 0, seed=1), step_rows(10, 4, 0, seed=2))


def test_batches_are_filled_up_at_the_end():
    short = Example(np.array([1, 2]), np.array([False, True]))
    long = Example(np.array([3, 4, 5]), np.array([False, False, True]))
    ids, labels = collate([short, long])
    assert ids.tolist() == [[1, 2, 0], [3, 4, 5]]
    assert labels.tolist() == [[UNLEARNT, 2, UNLEARNT], [UNLEARNT, UNLEARNT, 5]]
