"""Tokens that the best attack recovers, and the perplexity that the noise costs, over the noise."""

from collections.abc import Mapping, Sequence
from itertools import cycle
from pathlib import Path

COLOURS = ("#4477aa", "#ee6677", "#228833", "#ccbb44", "#66ccee", "#aa3377")


def curves(path: Path, findings: Sequence[Mapping], chance: Mapping[str, float]) -> None:
    """Draw a column for each text to a PNG; needs matplotlib, which the bench extra has.

    findings: as `bench.inversion` has them, of which those sent as Q80 are drawn;  chance: text -> share
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise SystemExit(f"{path.name} needs matplotlib: pip install '.[bench]'") from None
    figure = Figure(figsize=(6 * len(chance), 7), layout="constrained")
    panels = figure.subplots(2, len(chance), squeeze=False, sharex=True)
    noises = sorted({each["noise"] for each in findings})
    for (upper, lower), (text, level) in zip(panels.T, chance.items(), strict=True):
        for colour, layers in zip(cycle(COLOURS), sorted({each["edge_layers"] for each in findings}), strict=False):
            line = [
                (noises.index(each["noise"]), 100 * max(each["recovered"].values()), each["perplexity"])
                for each in findings
                if (each["text"], each["edge_layers"], each["form"]) == (text, layers, "Q80")
            ]
            places, shares, perplexities = zip(*line, strict=True)
            label = f"{layers} layer{'' if layers == 1 else 's'} on the edge"
            upper.plot(places, shares, "o-", color=colour, label=label)
            lower.plot(places, perplexities, "o-", color=colour, label=label)
        upper.axhline(100 * level, color="grey", linestyle=":", label="the commonest token")
        upper.set(title=text, ylabel="% of tokens recovered by the best attack", ylim=(0, 105))
        lower.set(xlabel="noise, times the size of the values", ylabel="perplexity", yscale="log")
        lower.set_xticks(range(len(noises)), [f"{noise:g}" for noise in noises])
        for axes in (upper, lower):
            axes.spines[["top", "right"]].set_visible(False)
        upper.legend(frameon=False)
    figure.savefig(path, dpi=150)
    print(f"drawn to {path}")
