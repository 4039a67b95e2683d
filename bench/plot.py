"""Bars of the time of a token, split into inference and transfer, over the number of nodes."""

from collections.abc import Mapping
from pathlib import Path

Times = Mapping[int, tuple[float, float]]  # nodes -> ms of inference, ms of transfer


def bars(path: Path, sides: Mapping[str, Times]) -> None:
    """Draw one panel a side, each with a scale of its own, to a PNG; needs matplotlib, which the bench extra has."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit(f"{path.name} needs matplotlib: pip install '.[bench]'") from None
    figure = Figure(figsize=(5 * len(sides), 4), layout="constrained")
    for axes, (title, times) in zip(figure.subplots(1, len(sides), squeeze=False)[0], sides.items(), strict=True):
        labels = [str(nodes) for nodes in times]
        inference, transfer = zip(*times.values(), strict=True)
        axes.bar(labels, inference, label="inference", color="#4477aa")
        stack = axes.bar(labels, transfer, bottom=inference, label="transfer", color="#ee6677")
        totals = [sum(each) for each in times.values()]
        axes.bar_label(stack, [f"{total:.0f}" for total in totals], padding=2)
        axes.set(title=title, xlabel="nodes", ylabel="ms a token", ylim=(0, 1.1 * max(totals)))
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    print(f"drawn to {path}")
