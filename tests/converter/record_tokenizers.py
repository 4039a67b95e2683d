"""Record what the tokenizers library makes of a corpus: ``python -m tests.converter.record_tokenizers``.

Trains small tokenizers with the steps and special tokens of the families' own tokenizer.json files on this project's
sources, and writes them and their ids of each text to tests/converter/tokenizers. Needs the tokenizers package.
"""

import json
from pathlib import Path

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from tests.converter.corpus import CORPUS, FOLDER

SOURCES = Path(__file__).parents[2] / "dllama"
CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_SPECIAL = [
    *("<|begin_of_text|>", "<|end_of_text|>", "<|reserved_special_token_0|>", "<|start_header_id|>"),
    *("<|end_header_id|>", "<|eot_id|>"),
]
QWEN_SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
QWEN_ADDED = ["<think>", "</think>"]
GPT2_SPECIAL = ["<|endoftext|>"]


def text() -> str:
    sources = [path.read_text() for path in sorted((SOURCES / "formats").glob("*.py"))]
    return "\n".join(sources) + "".join(CORPUS.values()) * 3


def byte_level(*steps, use_regex: bool, **settings) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(**settings))
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last]) if steps else last
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(text().splitlines(keepends=True), trainer)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def split(digits: str):
    return pre_tokenizers.Split(Regex(CL100K % digits), "isolated")


def llama3() -> Tokenizer:
    tokenizer = byte_level(split("{1,3}"), use_regex=False, ignore_merges=True)
    tokenizer.add_special_tokens(LLAMA3_SPECIAL)
    bos = LLAMA3_SPECIAL[0]
    begin = processors.TemplateProcessing(
        single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, tokenizer.token_to_id(bos))]
    )
    tokenizer.post_processor = processors.Sequence([processors.ByteLevel(trim_offsets=True), begin])
    return tokenizer


def qwen3() -> Tokenizer:
    tokenizer = byte_level(split(""), use_regex=False)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.add_special_tokens(QWEN_SPECIAL)
    tokenizer.add_tokens([AddedToken(content, normalized=False, special=False) for content in QWEN_ADDED])
    return tokenizer


def gpt2() -> Tokenizer:
    tokenizer = byte_level(use_regex=True)
    tokenizer.add_special_tokens(GPT2_SPECIAL)
    return tokenizer


def smollm() -> Tokenizer:
    tokenizer = byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True)
    tokenizer.add_special_tokens(QWEN_SPECIAL)
    return tokenizer


def characters() -> Tokenizer:
    """Llama 2's steps, before Transformers 4.40 or so."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=[*special, *(f"<0x{byte:02X}>" for byte in range(256))],
        show_progress=False,
        max_token_length=12,
        limit_alphabet=110,
    )
    tokenizer.train_from_iterator(text().splitlines(), trainer)
    values = json.loads(tokenizer.to_str())
    values["added_tokens"] = values["added_tokens"][: len(special)]  # the byte pieces are found by byte fallback alone
    tokenizer = Tokenizer.from_str(json.dumps(values))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)]
    )
    return tokenizer


def metaspace(scheme: str) -> Tokenizer:
    tokenizer = characters()
    tokenizer.normalizer = None
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("\u2581", prepend_scheme=scheme, split=False)
    return tokenizer


def record() -> None:
    made = {
        **{make.__name__: make() for make in (llama3, qwen3, gpt2, smollm)},
        "llama2": characters(),
        **{f"metaspace_{scheme}": metaspace(scheme) for scheme in ("always", "first", "never")},
    }
    FOLDER.mkdir(exist_ok=True)
    for name, tokenizer in made.items():
        ids = {key: tokenizer.encode(text).ids for key, text in CORPUS.items()}
        values = {"tokenizer": json.loads(tokenizer.to_str()), "ids": ids}
        (FOLDER / f"{name}.json").write_text(json.dumps(values, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    record()
