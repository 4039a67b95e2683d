"""How long does a start take, and how much memory does a run need?

    python -m bench.load --shape llama2-7b

Files are in the page cache and compiled kernels in theirs: each program runs once before it counts. The time is from
the start of the Python process to the first token of a 16-token prompt. The peak memory is the resident set's after a
prompt of `--prompt` tokens, pages of the mapped model included.
"""

from dataclasses import asdict

from bench.harness import find_weights, job_of, question, take_turns
from bench.report import Figure, print_table, save
from bench.runs import Job, run
from bench.synth import SHAPES
from dllama.engine.memory import kv_bytes_per_token
from dllama.formats import FloatType


def main() -> None:
    options = question(__doc__, prompt=512)
    config = SHAPES[options.shape]
    job = job_of(options)
    weights = find_weights(options.shape, options.dir)
    sides = {
        "dllama": lambda job: run("dllama", job, weights, options.kernels),
        "llama.cpp": lambda job: run("llama.cpp", job, weights),
    }
    for side in sides.values():
        side(Job(job.threads, job.context))
    rounds = take_turns(options.rounds, {name: lambda side=side: side(job) for name, side in sides.items()})

    cache_mb = job.context * kv_bytes_per_token(config, FloatType.F16) / 1e6
    weights_mb = {"dllama": weights.model.stat().st_size / 1e6, "llama.cpp": weights.gguf.stat().st_size / 1e6}
    seconds = {name: Figure.of([each.first_token_ms / 1e3 for each in runs]) for name, runs in rounds.items()}
    peak_mb = {name: Figure.of([each.peak_bytes / 1e6 for each in runs]) for name, runs in rounds.items()}

    kernels = rounds["dllama"][0].kernels
    print(f"\nStart and memory, {options.shape}, {job.threads} threads")
    print(f"Context {job.context}: {cache_mb:.0f} MB of cache\n")
    print_table(
        ("program", "first token after", "peak memory", "beyond weights and cache"),
        [
            (
                f"dllama, {kernels}" if name == "dllama" else name,
                seconds[name].text(2, " s"),
                peak_mb[name].text(0, " MB"),
                f"{peak_mb[name].median - weights_mb[name] - cache_mb:+.0f} MB",
            )
            for name in sides
        ],
    )
    save(
        options.name or f"load-{options.shape}-{kernels}",
        {
            "question": "load",
            "shape": options.shape,
            "job": asdict(job),
            "kernels": kernels,
            "first_token_s": {name: asdict(figure) for name, figure in seconds.items()},
            "peak_mb": {name: asdict(figure) for name, figure in peak_mb.items()},
            "weights_mb": weights_mb,
            "cache_mb": cache_mb,
            "rounds": {name: [asdict(each) for each in runs] for name, runs in rounds.items()},
        },
    )


if __name__ == "__main__":
    main()
