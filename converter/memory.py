"""Memory that is used again, rather than given back to the system and taken anew for each chunk of rows."""

import contextlib
import ctypes

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # glibc's malloc.h
LARGEST_MMAP_THRESHOLD = 32 << 20  # the most that glibc takes


def keep_freed_memory(nbytes: int) -> None:
    """Let the C library keep up to ``nbytes`` of freed memory, where it is glibc; elsewhere nothing happens.

    It gives each buffer of some megabytes back as it is freed, and the system then clears the next one's pages one by
    one, which takes as long as reading into them. Blocks of up to 32 MiB are kept.
    """
    with contextlib.suppress(OSError, AttributeError, TypeError):  # another C library; CDLL(None) on Windows
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(M_MMAP_THRESHOLD, LARGEST_MMAP_THRESHOLD)
        mallopt(M_TRIM_THRESHOLD, nbytes)
