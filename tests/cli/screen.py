"""A small terminal: what is left on its screen after what a program has written."""

import re

PART = re.compile(r"\x1b\[(\d*)([AJm])|\r|\n|[^\x1b\r\n]+")


def screen(written: str) -> list[str]:
    """The lines in the end. It knows line breaks, colours, going to a line's start and up, and clearing."""
    rows, row, column = [""], 0, 0
    end = 0
    for part in PART.finditer(written):
        assert part.start() == end, f"unknown: {written[end : end + 20]!r}"
        end = part.end()
        if part[2] == "A":
            row -= int(part[1])
            assert row >= 0
        elif part[2] == "J":
            rows[row:] = [rows[row][:column]]
        elif part[2] == "m":
            pass  # of colorama, where it is installed: numba has it reset colours at the end
        elif part[0] == "\r":
            column = 0
        elif part[0] == "\n":
            row, column = row + 1, 0
            rows += [""] * (row + 1 - len(rows))
        else:
            rows[row] = rows[row][:column].ljust(column) + part[0] + rows[row][column + len(part[0]) :]
            column += len(part[0])
    assert end == len(written)
    return rows
