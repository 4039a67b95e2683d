"""Arm assembly of the kernels, on any machine: `python -m bench.arm_asm` prints it as JSON, `bench.arm_mca` reads it.

numba compiles for the machine it runs on, and llvmlite brings every target. So numba is told that this is an Arm
machine, and what it compiles is read, not called. The assembly is the same, line by line, that an Arm process makes.
The CPU comes from NUMBA_CPU_NAME and NUMBA_CPU_FEATURES.
"""

import json
import os
import platform
import tempfile

import llvmlite.binding as llvm

TRIPLE = "aarch64-unknown-linux-gnu"


def pretend_arm() -> None:
    """Turn numba in this process into a cross compiler. To be called before anything of dllama is imported."""
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    llvm.get_process_triple = lambda: TRIPLE
    platform.machine = lambda: "aarch64"


def assembly() -> dict:
    """The packed product: `rows` that it works on at once, and its `code` for each type of weights."""
    from numba import types

    from dllama.kernels import packed, tags

    function, code = packed.multiply_packed, {}
    for tag in (tags.Q40, tags.Q80):
        signature = (tags.TagType(tag), *(types.int64,) * 8)
        function.compile(signature)
        code[tag.name] = function.overloads[signature].library.get_asm_str()
    return {"rows": packed.ROWS, "code": code}


if __name__ == "__main__":
    pretend_arm()
    with tempfile.TemporaryDirectory() as folder:
        os.environ["NUMBA_CACHE_DIR"] = folder  # code that comes from a cache has no assembly to show
        print(json.dumps(assembly()))
