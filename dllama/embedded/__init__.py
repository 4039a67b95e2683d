"""The small model that comes with the package, and its tokenizer: what runs when no other model is named."""

from pathlib import Path

_FOLDER = Path(__file__).parent


def model_path() -> Path:
    return _FOLDER / "model.m"


def tokenizer_path() -> Path:
    return _FOLDER / "tokenizer.model"
