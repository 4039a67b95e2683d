"""JSON that comes from elsewhere: one object, of a bounded size, no name of it twice."""

import json
import os

from dllama.errors import FormatError
from dllama.formats.files import open_regular

MAX_JSON_BYTES = 100_000_000  # the limit that the safetensors library sets for its header


def read_json(path: str | os.PathLike) -> dict:
    """The object in a JSON file; FileError where it cannot be read, FormatError where there is none."""
    with open_regular(path) as file:
        text = file.read(MAX_JSON_BYTES + 1)
    if len(text) > MAX_JSON_BYTES:
        raise FormatError(path, f"larger than {MAX_JSON_BYTES:,} bytes")
    try:
        return parse_json(text)
    except ValueError as error:
        raise FormatError(path, str(error)) from None


def parse_json(text: bytes) -> dict:
    """The object that ``text`` is; ValueError with the reason where it is none."""
    try:
        value = json.loads(text.decode(), object_pairs_hook=_no_duplicates)
    except RecursionError:
        raise ValueError("not JSON: nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"not JSON: {error}") from None
    except UnicodeDecodeError:
        raise ValueError("not JSON: not UTF-8 text") from None
    if not isinstance(value, dict):
        raise ValueError("not a JSON object")
    return value


def _no_duplicates(pairs: list[tuple]) -> dict:
    result = dict(pairs)
    if len(result) != len(pairs):
        seen = set()
        twice = next(name for name, _ in pairs if name in seen or seen.add(name))
        raise ValueError(f"{twice} appears twice")
    return result
