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

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("dllama", "llama-cpp-python", "numpy", "numba", "llvmlite")


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
    cpu, memory = platform.processor(), None
    try:
        cpu = Path("/proc/cpuinfo").read_text().split("model name\t: ")[1].split("\n")[0]
        memory = round(int(Path("/proc/meminfo").read_text().split("MemTotal:")[1].split()[0]) / (1 << 20), 1)
    except (OSError, IndexError):  # macOS has neither file, Arm's cpuinfo no model name
        pass
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = None
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "memory_gib": memory,
        "system": platform.platform(),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "versions": versions,
    }


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
