"""Figures, the machine they were measured on, tables and JSON."""

import json
import os
import platform
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

import dllama

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("llama-cpp-python", "numpy", "numba", "llvmlite")


@dataclass(frozen=True)
class Figure:
    """The middle and the range of one quantity over the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> "Figure":
        return cls(statistics.median(values), min(values), max(values))

    def text(self, digits: int = 1, unit: str = "") -> str:
        """Such as `30.1 ms (29.8–30.5)`."""
        return f"{self.median:.{digits}f}{unit} ({self.low:.{digits}f}–{self.high:.{digits}f})"


def machine() -> dict:
    """What the figures were measured on: CPU, cores, memory, system, date and versions."""
    versions = {"python": platform.python_version(), "dllama": dllama.__version__}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    memory = _proc("meminfo").get("MemTotal")
    return {
        "cpu": _cpu(),
        "cores": os.cpu_count(),
        "memory_gib": round(int(memory.split()[0]) / (1 << 20), 1) if memory else None,
        "system": platform.platform(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions,
    }


def _cpu() -> str:
    """The CPU's name; on x86 with family and model, since virtual machines often shorten the name."""
    info = _proc("cpuinfo")
    if "model name" not in info:  # macOS, and Linux on Arm
        return platform.processor() or platform.machine()
    return "{model name} (family {cpu family}, model {model})".format_map(info)


def _proc(name: str) -> dict[str, str]:
    """The fields of /proc/NAME, the first of each name; none where there is no such file."""
    try:
        lines = Path("/proc", name).read_text().splitlines()
    except OSError:
        return {}
    fields = (line.split(":", 1) for line in reversed(lines) if ":" in line)
    return {field.strip(): value.strip() for field, value in fields}


def print_table(head: Sequence[str], rows: Sequence[Sequence]) -> None:
    """Print a markdown table with aligned columns."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    cells.insert(1, ["-" * width for width in widths])
    for row in cells:
        print("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |")


def save(name: str, results: dict) -> None:
    """Write `results`, with the machine's description, to bench/results/NAME.json."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    path = RESULTS / f"{name}.json"
    text = json.dumps({"machine": machine(), **results}, indent=2, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")
