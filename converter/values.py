"""Numbers and text out of a checkpoint's JSON or metadata, or a ValueError that says which value is wrong."""

from reprlib import repr as shown  # a few words of a value, however long it is


def whole(values: dict, key: str, default: int | None = None) -> int:
    """The whole number under a key; the default where the key is missing or null."""
    value = values.get(key)
    if value is None:
        if default is None:
            raise ValueError(f"{key} is missing")
        return default
    return whole_number(value, key)


def whole_number(value, what: str) -> int:
    """A value that must be a whole number."""
    if type(value) is not int:
        raise ValueError(f"{what} is {shown(value)}, not a whole number")
    if abs(value) >= 1 << 63:
        raise ValueError(f"{what} is too large a number")
    return value


def text(values: dict, key: str) -> str | None:
    """The text under a key; None where the key is missing."""
    value = values.get(key)
    if value is not None and not isinstance(value, str):
        raise ValueError(f"{key} is not text")
    return value


def flag(values: dict, key: str, default: bool) -> bool:
    """Whether a key is true, or is a number other than 0; the default where it is missing."""
    value = values.get(key, default)
    if type(value) not in (bool, int):
        raise ValueError(f"{key} is neither true nor false")
    return bool(value)


def number(value, what: str) -> float:
    """A number as a float."""
    if value is None:
        raise ValueError(f"{what} is missing")
    if type(value) not in (int, float):
        raise ValueError(f"{what} is {shown(value)}, not a number")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{what} is too large a number") from None


def epsilon(value, what: str) -> float:
    """The epsilon of the norms, one of the two that a `.m` file holds."""
    value = number(value, what)
    for known in (1e-5, 1e-6):
        if abs(value - known) < 1e-3 * known:  # as float32 it may be 9.999999747378752e-06
            return known
    raise ValueError(f"{what} is {value}, and a .m file holds 1e-05 and 1e-06 only")
