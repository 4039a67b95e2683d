"""GSM8K as plain text, a SentencePiece vocabulary made from it, and the token batches a model trains on."""

import io
import json
import re
from pathlib import Path

import numpy as np
import sentencepiece

from dllama.errors import FileError

# "He has <<3*4=12>>12 apples": the calculator's notes repeat what the text says next to them.
CALCULATOR_NOTE = re.compile(r"<<.*?>>")
# Typographic variants of ASCII signs, which would each cost a token and teach nothing.
ASCII_FORMS = str.maketrans(
    {
        "’": "'",
        "‘": "'",
        "“": '"',
        "”": '"',
        "−": "-",
        "–": "-",
        "\u00a0": " ",
        "\u2028": "\n",
        "\u200b": "",
    }
)


def read_problems(path: Path) -> list[str]:
    """The problems of a GSM8K ``.jsonl`` file, each as ``Question: …\\nAnswer: …\\n#### N``.

    Raises FileError for a file that is missing or holds anything else than one problem a line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
        problems = [json.loads(line) for line in lines if line.strip()]
        texts = [plain_text(problem["question"], problem["answer"]) for problem in problems]
    except OSError as error:
        raise FileError(path, error.strerror) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise FileError(path, "not a GSM8K file: each line must be a JSON object with question and answer") from None
    if not texts:
        raise FileError(path, "holds no problems")
    return texts


def plain_text(question: str, answer: str) -> str:
    """One problem in the only form that the model ever sees, without the calculator's notes."""
    lines = f"Question: {question}\nAnswer: {CALCULATOR_NOTE.sub('', answer)}".translate(ASCII_FORMS).splitlines()
    return "\n".join(" ".join(line.split()) for line in lines if line.strip())


def train_vocabulary(texts: list[str], vocab_size: int) -> bytes:
    """A serialised SentencePiece model with LLaMA's settings: BPE, single digits, bytes for what is unknown.

    The line break is a piece of its own, so that no piece crosses the border between question and answer.
    Raises ValueError when the texts are too few, or too many characters differ, for ``vocab_size`` pieces.
    """
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocab_size,
            model_type="bpe",
            byte_fallback=True,
            split_digits=True,
            user_defined_symbols=["\n"],
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=1 << 20,
            minloglevel=2,
        )
    except RuntimeError as error:
        raise ValueError(f"no vocabulary of {vocab_size} pieces: {str(error).splitlines()[-1].strip()}") from None
    return model.getvalue()


def encode(texts: list[str], vocabulary: sentencepiece.SentencePieceProcessor) -> list[np.ndarray]:
    """Each text as int64 token ids between bos and eos."""
    return [np.array([vocabulary.bos_id(), *ids, vocabulary.eos_id()]) for ids in vocabulary.encode(texts)]


def epoch_batches(documents: list[np.ndarray], epoch: int, seed: int, batch: int, length: int) -> np.ndarray:
    """All documents once, in an order that (seed, epoch) decides, packed end to end.

    Returns int64 ``[n_batches, batch, length]``. A random number of tokens is dropped at the start, so that
    documents meet other positions in each epoch, and what does not fill a batch is dropped at the end.
    Raises ValueError when the documents do not fill one batch.
    """
    random = np.random.default_rng((seed, epoch))
    stream = np.concatenate([documents[i] for i in random.permutation(len(documents))])
    n_batches, spare = divmod(len(stream), batch * length)
    if n_batches == 0:
        raise ValueError(f"{len(stream)} tokens of text do not fill one batch of {batch} x {length}")
    start = random.integers(0, min(spare, length) + 1)
    return stream[start : start + n_batches * batch * length].reshape(n_batches, batch, length)
