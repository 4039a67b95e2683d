import subprocess
import sys
import textwrap

import pytest


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux's account of page faults")
def test_buffers_are_taken_from_freed_memory():
    """Without it, each of the 100 buffers of 512 pages is taken from the system anew."""
    script = """
        import ctypes, resource
        import numpy as np
        from converter.memory import keep_freed_memory

        if not hasattr(ctypes.CDLL(None), "gnu_get_libc_version"):
            raise SystemExit("other C library")
        keep_freed_memory(64 << 20)
        for n in range(101):
            np.ones(2 << 20, np.uint8)
            if n == 0:
                before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    if "other C library" in done.stderr:
        pytest.skip("needs glibc")
    assert int(done.stdout) < 1000
