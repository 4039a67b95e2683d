"""What does PrivateLoRA cost a token, and how much of that is the network's?

    python -m bench.privatelora                     # the 7B shape, r = 128 on q, k and v, values travel as Q80
    python -m bench.privatelora --shape tinyllama-1.1b --tokens 32

Edge and cloud are two processes on this machine, one thread each. Each round starts them anew and measures in turn: the
cloud's model alone (one node, the cloud's threads); the pair on loopback; two edges at once; and the pair over a line
with added round trips, 60 Mbit/s up and 100 Mbit/s down (`bench.line`). Beside it stand what the line's physics allow,

    t + stops · (round trip) + bytes / bandwidth

with t the time of the model alone, and the round trip as a message of one byte takes it over that line; and the paper's
estimate, which counts bandwidth only (arXiv 2311.14030).
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from bench.edges import RANK, cloud_for, generate, make_adapter, throughput, wait_for
from bench.harness import find_weights, in_rounds, job_of, one_turn, question
from bench.report import Figure, print_table, save
from bench.runs import REPOSITORY, Weights, run
from dllama.formats import ModelFile

ROUND_TRIPS = (0.2e-3, 1e-3, 5e-3, 20e-3)
UP, DOWN = 60e6, 100e6


@contextmanager
def line(target: int, rtt: float) -> Iterator[str]:
    """A slow line to a port: its address."""
    command = [sys.executable, "-m", "bench.line", str(target), "--rtt", str(rtt), "--up", str(UP), "--down", str(DOWN)]
    process = subprocess.Popen(command, cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
    try:
        yield f"127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.kill()
        process.wait()


def allowed(alone_ms: float, stops: int, rtt_ms: float, nbytes: float) -> float:
    """Milliseconds of a token that the line's physics allow; half of the bytes go each way."""
    return alone_ms + stops * rtt_ms + 1e3 * 8 * nbytes / 2 * (1 / UP + 1 / DOWN)


def main() -> None:
    options = question(__doc__, shape="llama2-7b", tokens=24, prompt=16)
    weights = find_weights(options.shape, options.dir, gguf=False)
    with ModelFile(weights.model) as model:
        stops = model.config.n_layers
    report(options, stops, in_rounds(options.rounds, partial(one_round, options, weights)))


def one_round(options: argparse.Namespace, weights: Weights, label: str) -> dict[str, object]:
    """Everything once, with a cloud of its own: how its memory happens to lie is part of what is found."""
    job = job_of(argparse.Namespace(**{**vars(options), "threads": 1}))
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        adapter = make_adapter(weights, folder / "adapter")
        cloud = stack.enter_context(cloud_for(weights, folder))

        def edge(address: str | None = None) -> subprocess.Popen:
            return stack.enter_context(cloud.edge(adapter, options.tokens, address=address))

        one, other = all_of_them = [edge(), edge()]
        sides = {
            "alone": lambda: run("dllama", job, weights),
            "pair": lambda: generate(one)[0],
            "two edges": lambda: generate(one, other),
        }
        for rtt in ROUND_TRIPS:
            far = edge(stack.enter_context(line(int(cloud.address.rpartition(":")[2]), rtt)))
            sides[f"{rtt * 1e3:g} ms"] = lambda far=far: generate(far)[0]
            all_of_them.append(far)
        wait_for(*all_of_them)
        return one_turn(label, sides)


def report(options: argparse.Namespace, stops: int, rounds: dict[str, list]) -> None:
    """Table, JSON and plot."""
    alone = [Figure.of(each.token_ms).median for each in rounds["alone"]]
    pair = [statistics.median(each["token_ms"]) for each in rounds["pair"]]
    rtt_ms = [each["rtt_ms"] for each in rounds["pair"]]
    nbytes = statistics.median(rounds["pair"][0]["bytes"])
    bar = [p / (1.15 * a + stops * r) for p, a, r in zip(pair, alone, rtt_ms, strict=True)]
    both = [throughput(two) / throughput([one]) for two, one in zip(rounds["two edges"], rounds["pair"], strict=True)]
    print(f"\nPrivateLoRA, {options.shape}, r = {RANK} on q, k, v, Q80, one thread each, {stops} stops a token\n")
    print(f"A token moves {nbytes / 1e3:.1f} kB, both ways.")
    print(f"Round trip on loopback, encrypted: {Figure.of(rtt_ms).text(3, ' ms')}")
    print(f"Two edges at once: {Figure.of(both).text(2, ' ×')} the tokens of one\n")
    rows = [
        ("one node, no edge", Figure.of(alone).text(unit=" ms"), "", ""),
        ("edge and cloud, loopback", Figure.of(pair).text(unit=" ms"), "", Figure.of(bar).text(2, " × its bar")),
    ]
    measured, physics, paper = [], [], []
    for rtt in ROUND_TRIPS:
        here = rounds[f"{rtt * 1e3:g} ms"]
        times = [statistics.median(each["token_ms"]) for each in here]
        limits = [allowed(a, stops, each["rtt_ms"], nbytes) for a, each in zip(alone, here, strict=True)]
        over = Figure.of([t / limit for t, limit in zip(times, limits, strict=True)])
        measured.append(Figure.of(times).median)
        physics.append(Figure.of(limits).median)
        paper.append(allowed(statistics.median(alone), 0, 0, nbytes))
        line_name = f"+ {rtt * 1e3:g} ms, {UP / 1e6:g}/{DOWN / 1e6:g} Mbit/s"
        rows.append((line_name, Figure.of(times).text(unit=" ms"), f"{physics[-1]:.0f} ms", over.text(2, " ×")))
    print_table(("", "a token", "the line allows", "against that"), rows)
    name = options.name or f"privatelora-{options.shape}"
    save(name, {"options": {"shape": options.shape, "tokens": options.tokens, "rank": RANK},
                "alone": alone, "pair": pair,
                "rtt_ms": rtt_ms, "bytes": nbytes, "two_edges": both, "round_trips": ROUND_TRIPS,
                "measured_ms": measured, "allowed_ms": physics, "paper_ms": paper,
                "rounds": {k: v for k, v in rounds.items() if k != "alone"}})  # fmt: skip
    draw(REPOSITORY / "bench" / "results" / f"{name}.png", options.shape, measured, physics, paper)


def draw(path: Path, shape: str, measured: list[float], physics: list[float], paper: list[float]) -> None:
    """Tokens a second over the added round trip."""
    try:
        from matplotlib.figure import Figure as Drawing
    except ImportError:
        raise SystemExit(f"{path.name} needs matplotlib: pip install '.[bench]'") from None
    drawing = Drawing(figsize=(6, 4), layout="constrained")
    axes = drawing.subplots()
    ms = [rtt * 1e3 for rtt in ROUND_TRIPS]
    for times, label, style in (
        (paper, "bandwidth alone, as the paper estimates", ":"),
        (physics, "what the line allows", "--"),
        (measured, "measured", "o-"),
    ):
        axes.plot(ms, [1e3 / t for t in times], style, label=label)
    axes.set(xscale="log", title=f"{shape}, {UP / 1e6:g}/{DOWN / 1e6:g} Mbit/s", xlabel="added round trip, ms",
             ylabel="tokens a second", ylim=(0, None), xticks=ms, xticklabels=[f"{each:g}" for each in ms])  # fmt: skip
    axes.minorticks_off()
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    drawing.savefig(path, dpi=150)
    print(f"drawn to {path}")


if __name__ == "__main__":
    main()
