"""How much faster is a model over several nodes?

    python -m bench.cluster scaling --shape llama2-7b      # 1, 2, 4 and 8 emulated weak devices (Linux, as root)
    python -m bench.cluster unequal                        # three devices, one at a third of the others' speed
    python -m bench.cluster pair --shape tinyllama-1.1b    # two nodes of one thread against one of two threads
    python -m bench.cluster restart --shape llama2-7b      # a start, and a second one with the slices in the cache
    python -m bench.cluster memory --shape llama2-7b       # what the root needs with three workers

`scaling` and `unequal` run on devices that `bench.emulate` makes; the others on this machine as it is. Every run is a
new root; it decodes greedily after a prompt of 16 tokens, and its first tokens do not count.
"""

import argparse
import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from statistics import fmean

from bench import plot, synth
from bench.emulate import Devices
from bench.harness import WEIGHTS, find_weights, take_turns
from bench.nodes import Cluster, ClusterRun, as_json, on_devices, on_this_machine
from bench.report import RESULTS, Figure, print_table, save
from bench.runs import Weights
from bench.used_memory import UsedMemory
from dllama.cluster.node import NodeSpec
from dllama.cluster.planner import make_plan
from dllama.cluster.worker import IDLE_SECONDS
from dllama.errors import DllamaError
from dllama.formats import FloatType

NODES = (1, 2, 4, 8)
CONTEXT = 256
QUIET_SECONDS = IDLE_SECONDS + 5
"""Workers that have been left alone for so long have measured themselves again. While they start they share the core
with the start of the others, which devices do not."""
# Distributed Llama's README of 2024, Llama 2 7B, Q40 weights and Q80 buffers on Raspberry Pi 4B 8 GB, in ms a token:
# nodes -> (generation, inference, transfer).
PUBLISHED = {
    1: (1312.50, 1307.94, 1.81),
    2: (793.69, 739.00, 52.50),
    4: (494.00, 458.81, 34.06),
    8: (588.19, 296.69, 289.75),
}


# --- emulated devices ---------------------------------------------------------------------------------------------


def scaling(options: argparse.Namespace, weights: Weights) -> None:
    """1, 2, 4 and 8 devices with the same part of a core each.

    The same workers serve all counts, in turn, and before each run memory is full of files' pages: how fast it is
    depends on which pages of it a run gets.
    """
    counts = options.nodes
    published = PUBLISHED if options.shape == "llama2-7b" else {}
    with UsedMemory(options.dir) as used, devices_of([options.cpu] * max(counts), options) as devices:
        with Cluster(on_devices(devices), weights, CONTEXT) as cluster:

            def run(count: int) -> ClusterRun:
                used.fill(weights.model)
                return cluster.run(options.tokens, count)

            sides = {f"{count} nodes": partial(run, count) for count in counts}
            runs = dict(zip(counts, take_turns(options.rounds, sides).values(), strict=True))
    ms = {count: figures(each) for count, each in runs.items()}
    one = [token_ms(each) for each in runs[counts[0]]]
    speed_ups = {
        count: Figure.of([a / token_ms(b) for a, b in zip(one, each, strict=True)]) for count, each in runs.items()
    }
    print(f"\n{options.shape}, devices of {options.cpu:g} of a core, links of {options.link}\n")
    print_table(
        ("nodes", "a token", "inference", "transfer", "sent", "received", "speed-up", "published, Pi 4B", "speed-up"),
        [
            (
                count,
                *(ms[count][name].text(unit=" ms") for name in ("token", "inference", "transfer")),
                *(f"{ms[count][name].median:.0f} kB" for name in ("sent_kb", "received_kb")),
                speed_ups[count].text(2, " ×"),
                f"{published[count][0]:.0f} ms" if count in published else "",
                f"{published[1][0] / published[count][0]:.2f} ×" if count in published else "",
            )
            for count in counts
        ],
    )
    name = options.name or f"cluster-scaling-{options.shape}"
    save(
        name,
        {
            **described("scaling", options, cpu=options.cpu, link=options.link, period_ms=options.period),
            "nodes": {count: {key: asdict(figure) for key, figure in each.items()} for count, each in ms.items()},
            "speed_up": {count: asdict(each) for count, each in speed_ups.items()},
            "published_pi4_ms": published,
            "rounds": as_json({str(count): each for count, each in runs.items()}),
        },
    )
    ours = {count: (each["inference"].median, each["transfer"].median) for count, each in ms.items()}
    sides = {f"dllama, {options.shape}, emulated devices": ours}
    if published:
        sides["Distributed Llama, Llama 2 7B, Pi 4B"] = {count: times[1:] for count, times in published.items()}
    plot.bars(RESULTS / f"{name}.png", sides)


def unequal(options: argparse.Namespace, weights: Weights) -> None:
    """Three devices, one at a third of the others' speed, against the sum of what each does alone."""
    shares = [3 * options.cpu, 3 * options.cpu, options.cpu]
    with UsedMemory(options.dir) as used, devices_of(shares, options) as devices, contextlib.ExitStack() as stack:
        places = on_devices(devices)
        sides = {f"{share:.2f} of a core": [place] for place, share in zip(places[1:], shares[1:], strict=True)}
        sides["all three"] = places
        clusters = {
            name: stack.enter_context(Cluster(each, weights, CONTEXT, equal=False)) for name, each in sides.items()
        }
        time.sleep(QUIET_SECONDS)
        runs = turns(clusters, options, before=lambda: used.fill(weights.model))
    fast, slow, cluster = ([1000 / token_ms(run) for run in each] for each in runs.values())
    ratio = Figure.of([c / (2 * f + s) for f, s, c in zip(fast, slow, cluster, strict=True)])
    print(f"\n{options.shape}, links of {options.link}\n")
    rows = [(name, Figure.of(each).text(2)) for name, each in zip(runs, (fast, slow, cluster), strict=True)]
    used_nodes = sorted({len(run.nodes) for run in runs["all three"]})
    print(f"nodes that the plan uses: {', '.join(map(str, used_nodes))}\n")
    print_table(("device", "tokens/s"), [*rows, ("all three, of the sum of the single speeds", ratio.text(2, " ×"))])
    save(
        options.name or f"cluster-unequal-{options.shape}",
        {
            **described("unequal", options, cpu=shares, link=options.link, period_ms=options.period),
            "of_the_sum": asdict(ratio),
            "rounds": as_json(runs),
        },
    )


# --- this machine -------------------------------------------------------------------------------------------------


def pair(options: argparse.Namespace, weights: Weights) -> None:
    """Two nodes of one thread against one node of two threads."""
    with contextlib.ExitStack() as stack:
        two = stack.enter_context(Cluster(on_this_machine(2), weights, CONTEXT))
        one = stack.enter_context(Cluster(on_this_machine(1), weights, CONTEXT, threads=2))
        runs = turns({"one node of two threads": one, "two nodes of one thread": two}, options)
    one, two = runs.values()
    ratio = Figure.of([token_ms(a) / token_ms(b) for a, b in zip(one, two, strict=True)])
    print(f"\n{options.shape}, this machine\n")
    ratios = ("1", ratio.text(2, " ×"))
    print_table(
        ("", "a token", "transfer", "sent", "received", "speed"),
        [
            (
                name,
                *(ms[key].text(unit=" ms") for key in ("token", "transfer")),
                *(f"{ms[key].median:.0f} kB" for key in ("sent_kb", "received_kb")),
                each,
            )
            for (name, ms), each in zip(((name, figures(each)) for name, each in runs.items()), ratios, strict=True)
        ],
    )
    save(
        options.name or f"cluster-pair-{options.shape}",
        {**described("pair", options), "speed": asdict(ratio), "rounds": as_json(runs)},
    )


def restart(options: argparse.Namespace, weights: Weights) -> None:
    """The first start sends the slices; in the second the workers, started anew, have them in their caches.

    Shares go by what the nodes have measured. Both starts find memory full of other files' pages, as it
    is on a device that has been up for a while. A third one, again with the slices in the caches, finds it free: a
    virtual machine may have to ask its host for every page of it.
    """
    runs = {"first start": [], "second start": [], "second start, memory free": []}
    with UsedMemory(options.dir) as used:
        for _ in range(options.rounds):
            with Cluster(on_this_machine(2), weights, CONTEXT, own_copy=False, equal=False) as cluster:
                for name, each in runs.items():
                    if cluster.processes:
                        cluster.stop_workers()
                    used.free() if "free" in name else used.fill(weights.model, *cluster.slices())
                    cluster.start_workers()
                    each.append(cluster.run(options.tokens))
    print(f"\n{options.shape}, two nodes of one thread, this machine\n")
    columns = {"from the root's start": "first_token_s", "from reaching the workers": "ready_s"}
    seconds = {
        name: {column: Figure.of([getattr(run, field) for run in each]) for column, field in columns.items()}
        for name, each in runs.items()
    }
    rows = [(name, *(figure.text(2, " s") for figure in each.values())) for name, each in seconds.items()]
    print_table(("first token", *columns), rows)
    save(
        options.name or f"cluster-restart-{options.shape}",
        {
            **described("restart", options),
            "first_token_s": {
                name: {column: asdict(figure) for column, figure in each.items()} for name, each in seconds.items()
            },
            "rounds": as_json(runs),
        },
    )


def memory(options: argparse.Namespace, weights: Weights) -> None:
    """The root's peak memory with three workers that have no copy of the model, beyond its own slice and embedding."""
    config = synth.SHAPES[options.shape]
    with Cluster(on_this_machine(4), weights, CONTEXT, own_copy=False) as cluster:
        runs = repeat(cluster, options, "4 nodes")
    nodes = [NodeSpec(f"node{i}", read_speed=1e9) for i in range(4)]
    share = make_plan(config, nodes, context=CONTEXT, kv_type=FloatType.F16).shares[0]
    embedding = config.vocab_size * FloatType.F32.row_bytes(config.dim)
    slice_bytes = share.weight_bytes + CONTEXT * share.kv_bytes_per_position(FloatType.F16)
    peak = Figure.of([run.peak_bytes / 1e6 for run in runs])
    beyond = peak.median - (slice_bytes + embedding) / 1e6
    print(f"\n{options.shape}, a root with three workers, equal shares\n")
    print_table(
        ("root's peak", "its slice", "embedding", "beyond both"),
        [(peak.text(0, " MB"), f"{slice_bytes / 1e6:.0f} MB", f"{embedding / 1e6:.0f} MB", f"{beyond:+.0f} MB")],
    )
    save(
        options.name or f"cluster-memory-{options.shape}",
        {
            **described("memory", options),
            "peak_mb": asdict(peak),
            "slice_mb": slice_bytes / 1e6,
            "embedding_mb": embedding / 1e6,
            "rounds": as_json({"4 nodes": runs}),
        },
    )


# --- what they share ----------------------------------------------------------------------------------------------


def compile_kernels(folder: Path) -> None:
    """Have the kernels compiled by this machine as it is: a device takes minutes for what it takes seconds."""
    with Cluster(on_this_machine(2), find_weights("tiny", folder, gguf=False), CONTEXT) as cluster:
        cluster.run(1)


def devices_of(shares: Sequence[float], options: argparse.Namespace) -> Devices:
    """Emulated devices that take their turns on the machine's last core."""
    return Devices(len(shares), shares, options.link, options.period, core=max(os.sched_getaffinity(0)))


def repeat(cluster: Cluster, options: argparse.Namespace, name: str) -> list[ClusterRun]:
    """So many rounds of one cluster."""
    return turns({name: cluster}, options)[name]


def turns(
    clusters: dict[str, Cluster], options: argparse.Namespace, before: Callable[[], None] = lambda: None
) -> dict[str, list[ClusterRun]]:
    """Each cluster generates once a round, in turn."""

    def run(cluster: Cluster) -> ClusterRun:
        before()
        return cluster.run(options.tokens)

    return take_turns(options.rounds, {name: partial(run, each) for name, each in clusters.items()})


def token_ms(run: ClusterRun) -> float:
    """The mean time of a token: a device that is stopped and let go again has no typical one."""
    return fmean(run.token_ms)


def figures(runs: Sequence[ClusterRun]) -> dict[str, Figure]:
    """Of each quantity the mean token of every round, then the middle and the range of the rounds: ms and kB."""
    columns = {
        "token": ("token_ms", 1),
        "inference": ("inference_ms", 1),
        "transfer": ("transfer_ms", 1),
        "sent_kb": ("sent_bytes", 1000),
        "received_kb": ("received_bytes", 1000),
    }
    return {
        name: Figure.of([fmean(getattr(run, field)) / unit for run in runs]) for name, (field, unit) in columns.items()
    }


def described(question: str, options: argparse.Namespace, **more) -> dict:
    """What was asked, for the results file."""
    return {"question": f"cluster {question}", "shape": options.shape, "tokens": options.tokens, **more}


QUESTIONS = {each.__name__: each for each in (scaling, unequal, pair, restart, memory)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--shape", choices=synth.SHAPES, default="tinyllama-1.1b", help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side, default %(default)s")
    parser.add_argument("--tokens", type=int, default=24, help="tokens that count in a run, default %(default)s")
    parser.add_argument("--cpu", type=float, default=0.1, help="slowest emulated device: part of a core, default 0.1")
    parser.add_argument(
        "--nodes", type=int, nargs="+", default=NODES, help="scaling: numbers of devices, the first is the measure"
    )
    parser.add_argument("--link", default="1gbit", help="emulated device: rate of its link, default %(default)s")
    parser.add_argument(
        "--period", type=float, default=100, help="emulated device: ms between its turns, default %(default)s"
    )
    parser.add_argument("--dir", type=Path, default=WEIGHTS, help="folder that keeps the synthetic weights")
    parser.add_argument("--name", help="name of the results file, without .json")
    options = parser.parse_args()
    try:
        compile_kernels(options.dir)
        QUESTIONS[options.question](options, find_weights(options.shape, options.dir, gguf=False))
    except DllamaError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    main()
