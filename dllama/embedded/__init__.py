"""The small model that ships with the package: weights and vocabulary, as files beside this one.

``python -m dllama.train.embedded`` trained them, and ``dllama-convert hf`` made the Q40 file.
"""

from pathlib import Path

FOLDER = Path(__file__).parent


def model_path() -> Path:
    """The weights, Q40."""
    return FOLDER / "model.m"


def tokenizer_path() -> Path:
    """The SentencePiece vocabulary."""
    return FOLDER / "tokenizer.model"
