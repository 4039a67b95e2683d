"""How long does one more token take, and how close is that to the memory's limit?

    python -m bench.decode --shape llama2-7b          # short context
    python -m bench.decode --prompt 1500              # long context
    python -m bench.decode --kernels avx2             # dllama without AVX-512, llama.cpp as it is

Each round measures the read bandwidth, dllama and llama.cpp in turn, and counts with the median token of a program.
The share of the bandwidth is the bytes that a token must read, divided by its time and by the same round's bandwidth.
"""

from dataclasses import asdict

from bench.bandwidth import read_bandwidth
from bench.harness import find_weights, job_of, question, take_turns
from bench.report import Figure, print_table, save
from bench.runs import run
from bench.synth import SHAPES
from dllama.engine.memory import kv_bytes_per_token
from dllama.formats import FloatType, ModelConfig, tensor_kinds


def token_bytes(config: ModelConfig, context: int) -> int:
    """Bytes that one token must read: weights but for the embedding and idle experts, `context` positions of an F16
    cache."""
    kinds = (kind for kind in tensor_kinds(config) if kind.tensor.name != "embedding")
    weights = sum(kind.active * kind.tensor.nbytes for kind in kinds)
    return weights + context * kv_bytes_per_token(config, FloatType.F16)


def main() -> None:
    options = question(__doc__, prompt=16, tokens=64)
    config = SHAPES[options.shape]
    job = job_of(options)
    weights = find_weights(options.shape, options.dir)
    rounds = take_turns(
        options.rounds,
        {
            "bandwidth": lambda: read_bandwidth(job.threads),
            "dllama": lambda: run("dllama", job, weights, options.kernels),
            "llama.cpp": lambda: run("llama.cpp", job, weights),
        },
    )
    nbytes = token_bytes(config, job.prompt + job.tokens // 2)
    gb_s = [each.best for each in rounds["bandwidth"]]
    ms = {name: [Figure.of(each.token_ms).median for each in rounds[name]] for name in ("dllama", "llama.cpp")}
    share = {name: Figure.of([nbytes / t / 1e4 / b for t, b in zip(ms[name], gb_s, strict=True)]) for name in ms}
    speedup = Figure.of([theirs / ours for ours, theirs in zip(ms["dllama"], ms["llama.cpp"], strict=True)])

    bandwidth = Figure.of(gb_s)
    kernels = rounds["dllama"][0].kernels
    print(f"\nDecode, {options.shape}, {job.threads} threads, after {job.prompt} tokens of context")
    print(f"A token reads {nbytes / 1e6:.0f} MB; read bandwidth {bandwidth.text(unit=' GB/s')}\n")
    print_table(
        ("program", "a token", "share of the bandwidth", "against llama.cpp"),
        [
            (label, Figure.of(ms[name]).text(unit=" ms"), share[name].text(0, " %"), ratio)
            for name, label, ratio in (
                ("dllama", f"dllama, {kernels}", speedup.text(2, " ×")),
                ("llama.cpp", "llama.cpp", "1"),
            )
        ],
    )
    save(
        options.name or f"decode-{options.shape}-{job.prompt}-{kernels}",
        {
            "question": "decode",
            "shape": options.shape,
            "job": asdict(job),
            "kernels": kernels,
            "bytes_per_token": nbytes,
            "bandwidth_gb_s": asdict(bandwidth),
            "token_ms": {name: asdict(Figure.of(values)) for name, values in ms.items()},
            "share_of_bandwidth_percent": {name: asdict(figure) for name, figure in share.items()},
            "speedup": asdict(speedup),
            "rounds": {name: [asdict(each) for each in runs] for name, runs in rounds.items()},
        },
    )


if __name__ == "__main__":
    main()
