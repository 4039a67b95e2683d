"""Text that comes in, from a file or standard input."""

import sys

from dllama.errors import FileError
from dllama.formats.files import open_regular


def read_text(path: str) -> str:
    """The text of a UTF-8 file, or of standard input for "-". Raises FileError."""
    if path == "-":
        path, raw = "standard input", sys.stdin.buffer.read()
    else:
        with open_regular(path) as file:
            raw = file.read()
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        raise FileError(path, f"not UTF-8 text (byte {error.start} is {raw[error.start]:#04x})") from None
