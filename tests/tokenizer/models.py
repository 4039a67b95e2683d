"""Tokenizers for tests: SentencePiece models trained on this project's own sources, and the same as `.t` files."""

import io
from pathlib import Path

import sentencepiece

from converter.tokenizer import convert_tokenizer

SOURCES = Path(__file__).parents[2] / "dllama" / "formats"
LLAMA2 = Path(__file__).parents[3] / "shared" / "data" / "llama2_tokenizer.model"

TEXTS = [
    "Hello world",
    " leading, trailing and  doubled  spaces ",
    " ",
    "    ",
    "\n\n\tindented\r\n",
    "def f(x):\n\treturn x ** 2  # squared\n",
    "naïve café, Übergröße, 世界, 🔶👩\u200d🚀, a\u0301, \u00a0\u3000wide",
    "\u2581\u2581 the library's own sign for a space \u2581",
    "<s></s><unk><0x41> are spelled out",
    "a\x00b\x7f",
    "1234567890 + 3.14159 = aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
    "".join(path.read_text() for path in sorted(SOURCES.glob("*.py")))[:10_000],
]


def train(path: Path, **options) -> Path:
    """Train a small SentencePiece model with Llama 2's settings, but for ``options``."""
    text = "\n".join(path.read_text() for path in sorted(SOURCES.glob("*.py")))
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        **{
            "sentence_iterator": iter(text.splitlines()),
            "model_writer": model,
            "vocab_size": 700,
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "split_digits": True,
            "minloglevel": 2,
            **options,
        }
    )
    path.write_bytes(model.getvalue())
    return path


def as_t(model: Path) -> Path:
    """The same tokenizer as a `.t` file beside the model."""
    path = model.with_suffix(".t")
    convert_tokenizer(model, path)
    return path
