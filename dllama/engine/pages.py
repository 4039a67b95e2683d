"""Large blocks of memory straight from the system: zeroed, taken as they are touched, in huge pages where it has them.

Walking through memory in 2 MB pages instead of 4 kB saves the page walks, which cost a virtual machine most.
"""

import mmap

import numpy as np

from dllama.engine.memory import in_units
from dllama.errors import OutOfMemoryError
from dllama.formats.files import reason

HUGE_PAGE = 2 << 20


def anonymous(nbytes: int, huge: bool) -> np.ndarray:
    """uint8 [nbytes], zeroed. Aligned to a huge page where ``huge`` asks for them: for memory that will be full.

    Raises OutOfMemoryError where the system refuses, as it does at a limit on the address space (``ulimit -v``).
    """
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    try:
        memory = mmap.mmap(-1, nbytes + HUGE_PAGE, **private)
    except OSError as error:
        raise OutOfMemoryError(f"the system refuses {in_units(nbytes)} of memory: {reason(error)}") from None
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE if huge else mmap.MADV_NOHUGEPAGE)
    pages = np.frombuffer(memory, np.uint8)
    start = -pages.ctypes.data % HUGE_PAGE if huge else 0
    return pages[start : start + nbytes]
