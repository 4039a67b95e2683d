"""What does PrivateLoRA reach with a GPU in the cloud?

    python -m bench.gpu                          # the 7B shape, r = 128 on q, k and v, values travel as Q80
    python -m bench.gpu --shape small --device cpu --rounds 1

Edges and cloud are processes on the GPU's machine, and talk over encrypted links on loopback. The decoder layers are on
the GPU, once packed in Q40 and once as F16. For each of these: the layers alone, for an edge without an adapter, which
meets the cloud once a token; one edge with an adapter, which meets it at every layer; and several of them at once.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import tempfile
from contextlib import ExitStack
from pathlib import Path

from bench.edges import RANK, Cloud, cloud_for, generate, make_adapter, throughput, wait_for
from bench.harness import find_weights, take_turns
from bench.report import Figure, print_table, save
from bench.synth import SHAPES
from dllama.folders import cache_folder

WEIGHTS = {"Q40": (), "F16": ("--unpack", "f16")}
SEVERAL = (2, 4, 8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b", help="default %(default)s")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="of the cloud; default %(default)s")
    parser.add_argument("--threads", type=int, default=min(4, os.cpu_count()), help="an edge's; default %(default)s")
    parser.add_argument("--tokens", type=int, default=64, help="default %(default)s")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.add_argument("--dir", type=Path, default=cache_folder() / "bench", help="folder of the synthetic weights")
    parser.add_argument("--name", help="name of the results file, without .json")
    options = parser.parse_args()
    weights = find_weights(options.shape, options.dir, gguf=False)
    found = {}
    forms = WEIGHTS if options.device == "cuda" else {"Q40": ()}
    with tempfile.TemporaryDirectory() as folder:
        adapter = make_adapter(weights, Path(folder) / "adapter")
        for form, unpacked in forms.items():
            clouds = "--device", options.device, *unpacked, "--max-edges", str(1 + max(SEVERAL))
            with ExitStack() as stack:
                cloud = stack.enter_context(cloud_for(weights, Path(folder), *clouds))

                def edge(adapter: Path | None, cloud: Cloud = cloud, stack: ExitStack = stack) -> subprocess.Popen:
                    return stack.enter_context(cloud.edge(adapter, options.tokens, options.threads))

                bare, edges = edge(None), [edge(adapter) for _ in range(max(SEVERAL))]
                wait_for(bare, *edges)
                sides = {"alone": lambda bare=bare: generate(bare)}
                for n in (1, *SEVERAL):
                    sides[_edges(n)] = lambda some=edges[:n]: generate(*some)
                found[form] = take_turns(options.rounds, sides)
            report(options, found)


def _edges(n: int) -> str:
    return "1 edge" if n == 1 else f"{n} edges"


def report(options: argparse.Namespace, found: dict[str, dict[str, list]]) -> None:
    """Table and JSON of what has been measured so far."""
    stops, rows, results = SHAPES[options.shape].n_layers, [], {}
    for form, rounds in found.items():
        device = rounds["alone"][0][0]["said"][-1].partition("(")[2].rpartition(")")[0]
        print(f"\n{options.shape} in {form}, {device}; an edge has {options.threads} threads")
        alone = [_of(edge, "token_ms") for (edge,) in rounds["alone"]]
        layers = [_of(edge, "cloud_ms") for (edge,) in rounds["alone"]]
        pair = [_of(edge, "token_ms") for (edge,) in rounds["1 edge"]]
        at_cloud = [_of(edge, "cloud_ms") for (edge,) in rounds["1 edge"]]
        rtt = [edge["rtt_ms"] for (edge,) in rounds["1 edge"]]
        stop = [(p - a) / stops for p, a in zip(pair, alone, strict=True)]
        rows += [
            (form, "the cloud's layers alone", Figure.of(layers).text(2, " ms"), _per_second(layers)),
            ("", "with the edge's ends, no adapter", Figure.of(alone).text(2, " ms"), _per_second(alone)),
            ("", f"an edge with r = {RANK}, {stops} stops", Figure.of(pair).text(2, " ms"), _per_second(pair)),
            ("", "  of it the cloud's passes", Figure.of(at_cloud).text(2, " ms"), ""),
            ("", "  a stop more than nothing", Figure.of(stop).text(3, " ms"), ""),
            ("", "  a round trip of one byte", Figure.of(rtt).text(3, " ms"), ""),
        ]
        together = {_edges(n): [throughput(edges) for edges in rounds[_edges(n)]] for n in SEVERAL}
        for name, each in together.items():
            rows.append(("", f"{name} at once", "", Figure.of(each).text(1, " tok/s")))
        medians = {name: [_medians(edge) for (edge,) in rounds[name]] for name in ("alone", "1 edge")}
        results[form] = {"device": device, "medians": medians, "tokens_a_second": together}
    print()
    print_table(("weights", "", "a token", "tokens a second"), rows)
    chosen = {name: getattr(options, name) for name in ("shape", "device", "threads", "tokens", "rounds")}
    save(options.name or f"privatelora-{options.shape}-gpu", {"options": {**chosen, "rank": RANK}, **results})


def _of(edge: dict, name: str) -> float:
    return statistics.median(edge[name])


def _medians(edge: dict) -> dict[str, float]:
    """What is kept of a run."""
    names = ("token_ms", "edge_ms", "wait_ms", "cloud_ms", "bytes")
    return {name: _of(edge, name) for name in names} | {name: edge[name] for name in ("rtt_ms", "prefill_ms")}


def _per_second(ms: list[float]) -> str:
    return Figure.of([1e3 / each for each in ms]).text(1, " tok/s")


if __name__ == "__main__":
    main()
