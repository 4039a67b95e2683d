"""One edge of PrivateLoRA in a process of its own: for each two lines of its input it gets ready, and generates.

Prints, as JSON, what it was told of the cloud, the round trip of the link, and of each token its times and bytes;
`bench.edges` starts it.
"""

import argparse
import json
import statistics
import sys
import time

from bench.runs import prompt_ids
from dllama import Llama, SamplerSettings
from dllama.cluster import key, wire
from dllama.cluster.links import Link
from dllama.privatelora.settings import EdgeSettings

PROBES = 60


def round_trip(cloud: str, cluster_key, pause: float) -> float:
    """Median milliseconds until the cloud has sent back a message of one byte; it is asked again after so many seconds,
    as it would be by a layer."""
    times = []
    with Link(cloud, cluster_key) as link:
        for number in range(PROBES):
            time.sleep(pause)
            start = time.perf_counter()
            link.send(wire.encode(wire.Probe(number), bytes(1)))
            assert link.receive(30_000)
            times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times[PROBES // 3 :])


def main() -> None:
    parser = argparse.ArgumentParser()
    for name in ("model", "tokenizer", "cloud"):
        parser.add_argument(name)
    for name in ("--adapter", "--key-file", "--form"):
        parser.add_argument(name)
    parser.add_argument("--tokens", type=int)
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    cluster_key = key.load(options.key_file)
    settings = EdgeSettings(options.cloud, cluster_key, options.adapter, form=options.form)
    greedy, said = SamplerSettings(temperature=0.0), []
    common = {"nthreads": options.threads, "context": 512, "private": settings, "notify": said.append}
    with Llama(options.model, options.tokenizer, **common) as llama:
        list(llama.generate(prompt_ids(options.prompt), 4, greedy))
        print("up", flush=True)
        for _ in sys.stdin:
            found = {"said": said, "rtt_ms": round_trip(options.cloud, cluster_key, 2e-3)}
            print("ready", flush=True)
            sys.stdin.readline()
            print(json.dumps({**found, **measure(llama, prompt_ids(options.prompt), options.tokens)}), flush=True)


def measure(llama: Llama, prompt: list[int], tokens: int) -> dict:
    """Generates so many tokens after the first; how long each took."""
    start, pieces, moments = time.monotonic(), [], []
    for piece in llama.generate(prompt, 1 + tokens, SamplerSettings(temperature=0.0)):
        pieces.append(piece)
        moments.append(time.monotonic())
    if len(pieces) != 1 + tokens:
        raise SystemExit(f"generation stopped early: {llama.stop_reason}")
    return {
        "start": start,
        "moments": moments,
        "prefill_ms": llama.prefill_ms,
        "token_ms": [piece.generation_ms for piece in pieces[1:]],
        "edge_ms": [piece.nodes[0].inference_ms for piece in pieces[1:]],
        "wait_ms": [piece.nodes[0].transfer_ms for piece in pieces[1:]],
        "cloud_ms": [piece.nodes[1].inference_ms for piece in pieces[1:]],
        "bytes": [piece.nodes[0].sent_bytes + piece.nodes[0].received_bytes for piece in pieces[1:]],
    }


if __name__ == "__main__":
    main()
