"""Are the Arm kernels fast enough for a Raspberry Pi's memory? An estimate, made without one.

    python -m bench.arm_mca                           # needs llvm-mca 16 or later, such as Debian's llvm-19

Takes the kernels' own assembly from `bench.arm_asm`, finds the loops of the packed product, and lets llvm-mca simulate
them on a model of the CPU, every load served by the first cache. So it tells what the arithmetic allows, to hold
against what the memory delivers. LLVM has no model of the Cortex-A76 and takes the older and narrower Cortex-A57's for
it; the Neoverse N1, the A76's server form, has its own. The Pi 5 is given in both.
"""

import argparse
import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from bench.report import print_table, save
from bench.runs import REPOSITORY

ITERATIONS = 1000
VALUES = 32  # in a block
BLOCK_BYTES = {"q40": 18, "q80": 34}
PRODUCT = re.compile(r"\t(sdot|smull2?|smlal2?)\t")


@dataclass(frozen=True)
class Board:
    """A Raspberry Pi. cpu and features as LLVM names them; models: what llvm-mca has for the CPU."""

    name: str
    cpu: str
    features: str
    models: tuple[str, ...]
    ghz: float
    cores: int
    memory_gb_s: tuple[float, float]  # read bandwidth of all cores together, from and to
    product_values: int  # values that a product instruction multiplies: 8 for smull and its like, 16 for sdot


BOARDS = (
    Board("Pi 4", "cortex-a72", "+neon", ("cortex-a72",), 1.8, 4, (4.0, 4.0), 8),
    Board("Pi 5", "cortex-a76", "+neon,+dotprod", ("cortex-a76", "neoverse-n1"), 2.4, 4, (9.0, 17.0), 16),
)


@dataclass(frozen=True)
class Result:
    """A loop on a model. tokens: rows of activations that a turn of the loop multiplies with the same weights."""

    board: str
    model: str
    weights: str
    tokens: int
    instructions: int
    stack_accesses: int  # registers that did not suffice
    cycles: float  # for a block of weights and one of activations
    core_gb_s: float  # weights read, one core
    core_gop_s: float  # multiplications and additions, one core


# --- the loops ----------------------------------------------------------------------------------------------------


def kernel_assembly(board: Board) -> dict:
    """What `bench.arm_asm` prints for the board's CPU."""
    environment = dict(os.environ, NUMBA_CPU_NAME=board.cpu, NUMBA_CPU_FEATURES=board.features)
    environment.pop("DLLAMA_KERNELS", None)
    command = [sys.executable, "-m", "bench.arm_asm"]
    result = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"bench.arm_asm failed for {board.cpu}:\n{result.stderr[-4000:]}")
    return json.loads(result.stdout)


def inner_loops(assembly: str) -> list[list[str]]:
    """The instructions of each loop without a branch target within."""
    lines = [line.split("//")[0].rstrip() for line in assembly.splitlines()]
    labels = {line[:-1]: i for i, line in enumerate(lines) if re.fullmatch(r"\.LBB\w+:", line)}
    loops = []
    for i, line in enumerate(lines):
        branch = re.match(r"\t(?:b\.\w+|cbn?z|tbn?z)\t.*(\.LBB\w+)$", line)
        first = labels.get(branch[1], i) if branch else i
        body = lines[first + 1 : i + 1]
        if body and not any(inner.startswith(".LBB") for inner in body):
            loops.append([inner for inner in body if inner and not inner.startswith("\t.")])
    return loops


def product_loops(board: Board, assembly: str) -> dict[int, list[str]]:
    """The loops that multiply, by the pairs of blocks that a turn multiplies; the longest of equals."""
    counted = [(sum(bool(PRODUCT.match(line)) for line in loop), loop) for loop in inner_loops(assembly)]
    return {n * board.product_values // VALUES: loop for n, loop in sorted(counted, key=lambda c: len(c[1])) if n}


# --- the simulation -----------------------------------------------------------------------------------------------


def find_mca() -> str:
    """The newest llvm-mca on the path. Exits where there is none that knows the Neoverse N1."""
    for name in (*(f"llvm-mca-{version}" for version in range(40, 15, -1)), "llvm-mca"):
        if path := shutil.which(name):
            if int(mca_version(path).split(".")[0]) >= 16:
                return path
    raise SystemExit("no llvm-mca of version 16 or later: apt-get install llvm-19")


def mca_version(mca: str) -> str:
    return re.search(r"version ([\d.]+)", subprocess.run([mca, "--version"], capture_output=True, text=True).stdout)[1]


def cycles_per_turn(mca: str, model: str, loop: list[str]) -> float:
    """Cycles that the model takes for a turn of the loop, one turn starting before the last ends."""
    command = [mca, "-march=aarch64", f"-mcpu={model}", "-mattr=+dotprod", f"-iterations={ITERATIONS}", "-json"]
    result = subprocess.run(command, input="\n".join(loop) + "\n", capture_output=True, text=True)
    if result.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{result.stderr[-4000:]}")
    return json.loads(result.stdout)["CodeRegions"][0]["SummaryView"]["TotalCycles"] / ITERATIONS


def simulate(mca: str, board: Board) -> Iterator[Result]:
    """The product's loops on all models of the board."""
    kernels = kernel_assembly(board)
    for weights, code in kernels["code"].items():
        for pairs, loop in sorted(product_loops(board, code).items()):
            tokens = pairs // kernels["rows"]
            stack = sum("[sp" in line for line in loop)
            for model in board.models:
                cycles = cycles_per_turn(mca, model, loop) / pairs
                gb_s = BLOCK_BYTES[weights] / (cycles * tokens) * board.ghz
                gop_s = 2 * VALUES / cycles * board.ghz
                yield Result(board.name, model, weights, tokens, len(loop), stack, cycles, gb_s, gop_s)


# --- the tables ---------------------------------------------------------------------------------------------------


def print_decode(boards: dict[str, Board], results: list[Result]) -> None:
    rows = []
    for r in results:
        board = boards[r.board]
        low, high = board.memory_gb_s
        memory = f"{low:g}" if low == high else f"{low:g}–{high:g}"
        needed = "–".join(dict.fromkeys(str(math.ceil(gb_s / r.core_gb_s)) for gb_s in board.memory_gb_s))
        rates = (f"{r.core_gb_s:.1f}", f"{board.cores * r.core_gb_s:.1f}", memory, needed)
        rows.append((r.weights.upper(), r.board, r.model, f"{r.cycles:.1f}", *rates))
    print("\nOne token: GB/s of weights that the arithmetic keeps up with, against the memory's\n")
    print_table(
        ("weights", "board", "model", "cycles a block", "one core", "all cores", "memory", "cores to fill it"), rows
    )


def print_prefill(boards: dict[str, Board], results: list[Result]) -> None:
    rows = []
    for r in results:
        all_cores = boards[r.board].cores * r.core_gop_s
        rows.append((r.weights.upper(), r.board, r.model, r.tokens, f"{r.cycles:.1f}", f"{all_cores:.0f}"))
    print("\nMany tokens: cycles for a block and a token, and billions of operations a second of all cores\n")
    print_table(("weights", "board", "model", "tokens at once", "cycles", "GOP/s"), rows)


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    mca = find_mca()
    boards = {board.name: board for board in BOARDS}
    results = [result for board in BOARDS for result in simulate(mca, board)]
    print(f"llvm-mca {mca_version(mca)}")
    print_decode(boards, [r for r in results if r.tokens == 1])
    print_prefill(boards, [r for r in results if r.tokens > 1])
    save(
        "arm_mca",
        {
            "question": "arm_mca",
            "llvm_mca": mca_version(mca),
            "boards": [asdict(board) for board in BOARDS],
            "results": [asdict(result) for result in results],
        },
    )


if __name__ == "__main__":
    main()
