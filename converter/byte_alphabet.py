"""GPT-2's alphabet: how byte-level tokenizers write bytes as printable characters in their files."""

PRINTABLE = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
OTHERS = [byte for byte in range(256) if byte not in PRINTABLE]

CHARACTERS = {byte: chr(byte) for byte in PRINTABLE} | {byte: chr(256 + i) for i, byte in enumerate(OTHERS)}
BYTES = {character: byte for byte, character in CHARACTERS.items()}


def from_alphabet(piece: str) -> bytes:
    """The bytes that a piece stands for; ValueError for a character that is not of the alphabet."""
    try:
        return bytes([BYTES[character] for character in piece])
    except KeyError as error:
        raise ValueError(f"token {piece!r} has {error.args[0]!r}, which is not of the byte-level alphabet") from None


def to_alphabet(piece: bytes) -> str:
    """The characters that stand for a piece's bytes."""
    return "".join(CHARACTERS[byte] for byte in piece)
