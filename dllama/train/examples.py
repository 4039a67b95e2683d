"""Prompts and answers out of a JSON Lines file, as token ids of which those of the answers are to be learnt."""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dllama.errors import FileError, FormatError, ModelError
from dllama.formats.files import open_regular
from dllama.tokenizer import Tokenizer

UNLEARNT = -100
"""The label of a token whose prediction does not count (torch's ``ignore_index``)."""

FORMS = 'a prompt and an answer ({"prompt": "...", "answer": "..."}), or messages'


@dataclass(frozen=True)
class Example:
    """ids: int64 [length];  learnt: bool [length], the tokens whose prediction counts, never the first"""

    ids: np.ndarray
    learnt: np.ndarray


def read_examples(path: Path, tokenizer: Tokenizer, context: int) -> tuple[list[Example], int]:
    """The examples that fit into ``context`` tokens, and how many do not.

    A line is ``{"prompt", "answer"}``: the answer continues the prompt as it stands, and the end-of-text token follows.
    Or it is ``{"messages": [{"role", "content"}, ...]}``, written by the tokenizer's chat template; what the assistant
    says is learnt. Raises FileError (FormatError) for a file that holds something else or nothing, ModelError where
    messages come without a chat template.
    """
    examples, too_long = [], 0
    for number, values in _lines(path):
        try:
            example = _example(values, tokenizer)
        except ValueError as error:
            raise FormatError(path, f"line {number}: {error}") from None
        if len(example.ids) > context:
            too_long += 1
        else:
            examples.append(example)
    if not examples:
        long = f": all {too_long} examples are longer than {context} tokens" if too_long else " to learn"
        raise FileError(path, f"holds nothing{long}")
    return examples, too_long


def step_rows(n_examples: int, size: int, step: int, seed: int) -> np.ndarray:
    """Which ``size`` examples a step learns from: each once in an epoch, in an order that (seed, epoch) decides.
    The last step of an epoch has those that are left."""
    epoch, index = divmod(step, steps_of_epoch(n_examples, size))
    order = np.random.default_rng((seed, epoch)).permutation(n_examples)
    return order[index * size : (index + 1) * size]


def steps_of_epoch(n_examples: int, size: int) -> int:
    """Steps that use every example once."""
    return -(-n_examples // size)


def collate(examples: Sequence[Example]) -> tuple[np.ndarray, np.ndarray]:
    """One batch: ids and labels, int64 [rows, longest]. Filled up at the end with id 0; a label is the token's own id,
    UNLEARNT where it is not learnt."""
    ids = np.zeros((len(examples), max(len(example.ids) for example in examples)), np.int64)
    labels = np.full(ids.shape, UNLEARNT, np.int64)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = example.ids
        labels[row, : len(example.ids)] = np.where(example.learnt, example.ids, UNLEARNT)
    return ids, labels


def _lines(path: Path) -> Iterator[tuple[int, dict]]:
    with open_regular(path) as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                values = json.loads(line)
            except (ValueError, RecursionError):
                raise FormatError(path, f"line {number} is not JSON: each line must be {FORMS}") from None
            if not isinstance(values, dict):
                raise FormatError(path, f"line {number} is not {FORMS}")
            yield number, values


def _example(values: dict, tokenizer: Tokenizer) -> Example:
    prompt, answer, messages = values.get("prompt"), values.get("answer"), values.get("messages")
    if isinstance(prompt, str) and isinstance(answer, str) and answer:
        ids = tokenizer.encode(prompt + answer)
        learnt = np.zeros(len(ids) + 1, bool)
        learnt[max(1, _tokens_before(tokenizer.encode(prompt), ids)) :] = True  # nothing comes before the first
        return Example(np.array([*ids, _end(tokenizer)]), learnt)
    if _is_conversation(messages):
        return _conversation(messages, tokenizer)
    raise ValueError(f"not {FORMS}")


def _is_conversation(messages) -> bool:
    return isinstance(messages, list) and all(
        isinstance(message, dict) and isinstance(message.get("role"), str) and isinstance(message.get("content"), str)
        for message in messages
    )


def _conversation(messages: list[dict], tokenizer: Tokenizer) -> Example:
    """A conversation up to the assistant's last words; all of its answers are learnt."""
    spans, text = [], ""
    for i, message in enumerate(messages):
        if message["role"] == "assistant":
            before = _written(messages[:i], tokenizer, add_generation_prompt=True)
            after = _written(messages[: i + 1], tokenizer, add_generation_prompt=False)
            if not (before.startswith(text) and after.startswith(before)):
                raise ValueError("the chat template changes earlier turns: put one answer in a line, at its end")
            spans.append((len(before), len(after)))
            text = after
    if not spans:
        raise ValueError("no message of the assistant, so nothing to learn")
    ids = tokenizer.encode(text, bos=False, special=True)
    learnt = np.zeros(len(ids), bool)
    for span in spans:
        first, end = (_tokens_before(tokenizer.encode(text[:place], bos=False, special=True), ids) for place in span)
        learnt[first:end] = True
    learnt[:1] = False
    return Example(np.array(ids), learnt)


def _written(messages: list[dict], tokenizer: Tokenizer, add_generation_prompt: bool) -> str:
    """The chat template's text for some messages."""
    if not tokenizer.chat_template:
        raise ModelError("the tokenizer has no chat template: write prompt and answer, not messages")
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    spelled = {i: text for text, i in tokenizer.special.items()}
    eos_id = tokenizer.eos_ids[0] if tokenizer.eos_ids else None
    try:
        texts, _ = render_jinja_template(
            conversations=[messages],
            chat_template=tokenizer.chat_template,
            add_generation_prompt=add_generation_prompt,
            bos_token=spelled.get(tokenizer.bos_id, ""),
            eos_token=spelled.get(eos_id, ""),
        )
    except TemplateError as error:
        raise ValueError(f"the chat template refuses it: {error}") from None
    return texts[0]


def _tokens_before(first: list[int], ids: list[int]) -> int:
    """How many tokens of a text belong to its beginning, ``first`` being the tokens of that alone: where a token spans
    the border, it belongs to what follows."""
    return next((i for i, (a, b) in enumerate(zip(first, ids, strict=False)) if a != b), min(len(first), len(ids)))


def _end(tokenizer: Tokenizer) -> int:
    if not tokenizer.eos_ids:
        raise ModelError("the tokenizer has no end-of-text token, so an answer has no end")
    return tokenizer.eos_ids[0]
