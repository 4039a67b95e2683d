"""Memory as it is on a device that has been up for a while: full of the pages of files that were read at some time.

Programs get such pages at once, in place of the files'. Free memory may take longer: the host of a virtual machine
takes it back, and hands it out again page by page as it is touched (0.5 GB/s where `bench.cluster restart` ran).
"""

import contextlib
import time
from pathlib import Path

LEFT_FREE = 600 << 20
"""The system begins to look for pages before the last one is gone."""
HOST_SECONDS = 5
"""Until a host has noticed free pages, and taken them back."""
CHUNK = 8 << 20


class UsedMemory:
    """Fills memory with the pages of a file without contents; for use in `with`, which removes it."""

    def __init__(self, folder: Path):
        self._path = folder / "pages"

    def __enter__(self) -> "UsedMemory":
        return self

    def __exit__(self, *exception) -> None:
        self.free()

    def fill(self, *files: Path) -> None:
        """Until hardly any memory is free; then reads these files, so that their pages are there."""
        self._path.touch()
        buffer = bytearray(CHUNK)
        with open(self._path, "rb+", buffering=0) as file:
            file.truncate(_memory("MemTotal"))
            while _memory("MemFree") > LEFT_FREE and file.readinto(buffer):
                pass
        for path in files:
            with open(path, "rb", buffering=0) as file:
                while file.readinto(buffer):
                    pass

    def free(self) -> None:
        """Gives these pages back to the system, and to a host that takes them."""
        with contextlib.suppress(FileNotFoundError):
            self._path.unlink()
            time.sleep(HOST_SECONDS)


def _memory(name: str) -> int:
    """A figure of /proc/meminfo in bytes."""
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) << 10
