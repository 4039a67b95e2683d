"""Hugging Face's `tokenizer.json` -> Vocabulary.

Two kinds are read: byte-level BPE (Llama 3, Qwen 2 and 3, GPT-2, SmolLM) and BPE over characters with a sign for the
space (Llama 1 and 2, Mistral).
"""

import os

from converter.byte_alphabet import from_alphabet
from converter.merges import merge_scores
from dllama.errors import FormatError
from dllama.formats.json_file import read_json
from dllama.formats.vocabulary import ADDED, CONTROL, PreTokenizer, Vocabulary

META_SPACE = "\u2581"

_CL100K = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PATTERNS = {_CL100K % "{1,3}": PreTokenizer.LLAMA3, _CL100K % "": PreTokenizer.QWEN2}
"""Patterns of ``Split`` before ``ByteLevel``."""

MAX_PADDING = 1 << 16  # rows that a model may have beyond twice the tokenizer's tokens

SEQUENCES = {"normalizer": "normalizers", "pre_tokenizer": "pretokenizers", "post_processor": "processors"}
"""Where a ``Sequence`` of a kind of steps lists them."""


def read_tokenizer_json(path: str | os.PathLike, bos: str | int | None = None, size: int | None = None) -> Vocabulary:
    """The vocabulary of a `tokenizer.json`; FormatError where it is none, or not one that a `.t` file can hold.

    bos: the token that begins a text, or its id, where the checkpoint says so
    size: tokens that the model has, more than the tokenizer's where they are padded
    The ids that end a text are not in the file: the vocabulary has none.
    """
    try:
        return parse_tokenizer_json(read_json(path), bos, size)
    except ValueError as error:
        raise FormatError(path, str(error)) from None


def parse_tokenizer_json(values: dict, bos: str | int | None = None, size: int | None = None) -> Vocabulary:
    """As ``read_tokenizer_json``, from the object in the file. ValueError with the reason."""
    model = _object(values, "model")
    if model.get("type", "BPE") != "BPE":
        raise ValueError(f"a {model['type']} model is not supported (known: BPE)")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise ValueError(f"{key} is not supported")
    style = _style(values)
    byte_level = style is not None and style.byte_level
    if model.get("ignore_merges") and style is not PreTokenizer.LLAMA3:
        raise ValueError("ignore_merges is supported with Llama 3's pattern only")
    tokens, added = _tokens(model), _added(values)
    if byte_level:
        pieces = {i: from_alphabet(text) for text, i in tokens.items() if i not in added}
    else:
        pieces = {i: text.replace(META_SPACE, " ").encode() for text, i in tokens.items() if i not in added}
    if not isinstance(model.get("merges"), list):
        raise ValueError("merges is missing")
    scores = merge_scores(model["merges"], tokens)
    if not byte_level:
        _check_unknown(model, tokens)

    highest = max([*tokens.values(), *added], default=-1)
    if highest >= 2 * (len(tokens) + len(added)):
        raise ValueError(f"token ids up to {highest} for {len(tokens) + len(added)} tokens")
    if size is not None and not highest < size <= 2 * (highest + 1) + MAX_PADDING:
        raise ValueError(f"{highest + 1:,} tokens, and the model has {size:,}: they do not belong together")
    for i in range(max(highest + 1, size or 0)):
        if i in added:
            content, special = added[i]
            pieces[i], scores[i] = content.encode(), CONTROL if special else ADDED
        elif i not in pieces:
            pieces[i], scores[i] = b"[PAD%d]" % i, CONTROL

    begins = _begins_with(values)
    bos_id = _id(bos, tokens, added) if bos is not None else begins
    if byte_level and bos_id is None and added:
        bos_id = min(added)  # readers of byte-level files look for the special tokens from here on
    return Vocabulary(
        [pieces[i] for i in range(len(pieces))],
        [scores.get(i, 0.0) for i in range(len(pieces))],
        bos_id=bos_id,
        eos_ids=(),
        add_bos=begins is not None,
        pre_tokenizer=style,
    )


def _style(values: dict) -> PreTokenizer | None:
    """The pre-tokenizer, from the steps that the file lists; None is SentencePiece's way."""
    normalizers, steps = _flat(values, "normalizer"), _flat(values, "pre_tokenizer")
    kinds = [step.get("type") for step in steps]
    if kinds and kinds[-1] == "ByteLevel":
        style = _byte_level_style(steps)
        composed = [step.get("type") for step in normalizers] == ["NFC"]
        if style is None or (normalizers and not composed) or composed != (style is PreTokenizer.QWEN2):
            raise ValueError("a byte-level tokenizer of another family (known: Llama 3, Qwen 2 and 3, GPT-2, SmolLM)")
        return style
    replaces = [step for step in normalizers if step.get("type") == "Replace"]
    if all(s.get("pattern") == {"String": " "} and s.get("content") == META_SPACE for s in replaces) and not steps:
        if [s.get("type") for s in normalizers] == ["Prepend", "Replace"] and normalizers[0].get(
            "prepend"
        ) == META_SPACE:
            return None
        if [s.get("type") for s in normalizers] == ["Replace"]:
            return PreTokenizer.SPACE_NEVER
    if kinds == ["Metaspace"] and not normalizers and steps[0].get("replacement") == META_SPACE:
        return _metaspace_style(steps[0])
    raise ValueError(
        f"normalizer {[s.get('type') for s in normalizers]} and pre_tokenizer {kinds} are not supported together"
        " (known: byte-level BPE, and Llama 2's)"
    )


def _byte_level_style(steps: list[dict]) -> PreTokenizer | None:
    *before, last = steps
    if last.get("add_prefix_space") is not False:
        return None
    if last.get("use_regex", True):
        if not before:
            return PreTokenizer.GPT2
        digits = len(before) == 1 and before[0].get("type") == "Digits" and before[0].get("individual_digits")
        return PreTokenizer.SMOLLM if digits else None
    split = before[0] if len(before) == 1 else {}
    if split.get("type") != "Split" or split.get("behavior") != "Isolated" or split.get("invert"):
        return None
    pattern = split.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    return PATTERNS.get(regex) if isinstance(regex, str) else None


def _metaspace_style(step: dict) -> PreTokenizer:
    if step.get("split", True):
        raise ValueError("a Metaspace that splits words is not supported")
    scheme = step.get("prepend_scheme", "always" if step.get("add_prefix_space", True) else "never")
    styles = {
        "always": PreTokenizer.SPACE_ALWAYS,
        "first": PreTokenizer.SPACE_FIRST,
        "never": PreTokenizer.SPACE_NEVER,
    }
    if not isinstance(scheme, str) or scheme not in styles:
        raise ValueError(f"prepend_scheme {scheme} is not known (known: {', '.join(styles)})")
    return styles[scheme]


def _tokens(model: dict) -> dict[str, int]:
    tokens = _object(model, "vocab")
    if not all(type(i) is int and i >= 0 for i in tokens.values()) or len(set(tokens.values())) != len(tokens):
        raise ValueError("the vocabulary's ids are not numbers that differ")
    return tokens


def _added(values: dict) -> dict[int, tuple[str, bool]]:
    """id -> content and whether it is special, of the tokens that are found in the text before anything else."""
    tokens = values.get("added_tokens") or []
    if not isinstance(tokens, list) or not all(isinstance(token, dict) for token in tokens):
        raise ValueError("added_tokens is not a list of objects")
    normalizers = [step.get("type") for step in _flat(values, "normalizer")]
    result = {}
    for token in tokens:
        i, content = token.get("id"), token.get("content")
        if type(i) is not int or i < 0 or not isinstance(content, str) or not content:
            raise ValueError(f"added token {content!r} has id {i!r}")
        # Early conversions of LLaMA say so of their special tokens: the library finds these after spaces only, a .t
        # file wherever they are spelled.
        if token.get("normalized") and not token.get("special") and _is_changed(content, normalizers):
            raise ValueError(f"added token {content!r} is sought in the normalised text, which a .t file cannot say")
        strips = [flag for flag in ("lstrip", "rstrip", "single_word") if token.get(flag)]
        if strips:
            raise ValueError(f"added token {content!r} has {strips[0]}, which a .t file cannot say")
        result[i] = (content, bool(token.get("special")))
    return result


def _is_changed(content: str, normalizers: list) -> bool:
    """Whether the library, which normalises such a token as well, finds it elsewhere than where it is spelled.

    ``Prepend`` puts a space into each, ``Replace`` makes another character of a space. A composed text (NFC) holds what
    is ASCII where it was, but for one that is followed by a combining character of its own.
    """
    return (
        "Prepend" in normalizers
        or ("Replace" in normalizers and bool({" ", META_SPACE} & set(content)))
        or ("NFC" in normalizers and not content.isascii())
    )


def _check_unknown(model: dict, tokens: dict[str, int]) -> None:
    """ValueError where characters that are no token do not become what a `.t` file's do: their bytes' pieces, or one
    <unk> for a run of them where there are no such pieces."""
    ids = [tokens.get(f"<0x{byte:02X}>") for byte in range(256)]
    in_a_row = ids[0] is not None and ids == list(range(ids[0], ids[0] + 256))
    if in_a_row:
        if not model.get("byte_fallback"):
            raise ValueError("byte_fallback is not true, and a .t file spells unknown characters in byte pieces")
    elif model.get("byte_fallback") and ids != [None] * 256:
        raise ValueError("byte_fallback with byte pieces that are not all there, or not in a row, is not supported")
    elif model.get("unk_token") != "<unk>" or tokens.get("<unk>") != 0 or not model.get("fuse_unk"):
        raise ValueError("unknown characters become something else than one <unk> of id 0 for a run of them")


def _begins_with(values: dict) -> int | None:
    """The id that the file's template puts before a text, or None."""
    for step in _flat(values, "post_processor"):
        if step.get("type") == "TemplateProcessing":
            single, special = step.get("single"), step.get("special_tokens")
            if isinstance(single, list) and single and isinstance(special, dict) and isinstance(single[0], dict):
                named = single[0].get("SpecialToken")
                name = named.get("id") if isinstance(named, dict) else None
                token = special.get(name) if isinstance(name, str) else None
                ids = token.get("ids") if isinstance(token, dict) else None
                if isinstance(ids, list) and ids and type(ids[0]) is int:
                    return ids[0]
    return None


def _id(token: str | int, tokens: dict[str, int], added: dict[int, tuple]) -> int:
    if isinstance(token, int):
        return token
    ids = tokens | {content: i for i, (content, _) in added.items()}
    if token not in ids:
        raise ValueError(f"bos token {token!r} is no token")
    return ids[token]


def _flat(values: dict, key: str) -> list[dict]:
    """The steps of one kind, whether there are none, one or a sequence of them."""
    step = values.get(key)
    if step is None:
        return []
    if not isinstance(step, dict):
        raise ValueError(f"{key} is not an object")
    steps = step.get(SEQUENCES[key]) if step.get("type") == "Sequence" else [step]
    if not isinstance(steps, list) or not all(isinstance(step, dict) for step in steps):
        raise ValueError(f"{key} is not a sequence of objects")
    return steps


def _object(values: dict, key: str) -> dict:
    if not isinstance(values.get(key), dict):
        raise ValueError(f"{key} is missing" if values.get(key) is None else f"{key} is not an object")
    return values[key]
