"""How fast is a prompt read?

    python -m bench.prefill --prompt 512

Each round runs dllama and llama.cpp in turn; a time is from the call until the prompt's first token is known.
"""

from dataclasses import asdict

from bench.harness import find_weights, job_of, question, take_turns
from bench.report import Figure, print_table, save
from bench.runs import run


def main() -> None:
    options = question(__doc__, prompt=512)
    job = job_of(options)
    weights = find_weights(options.shape, options.dir)
    rounds = take_turns(
        options.rounds,
        {
            "dllama": lambda: run("dllama", job, weights, options.kernels),
            "llama.cpp": lambda: run("llama.cpp", job, weights),
        },
    )
    rate = {name: [job.prompt / each.prefill_ms[0] * 1e3 for each in runs] for name, runs in rounds.items()}
    speedup = Figure.of([ours / theirs for ours, theirs in zip(rate["dllama"], rate["llama.cpp"], strict=True)])

    kernels = rounds["dllama"][0].kernels
    print(f"\nPrefill of {job.prompt} tokens, {options.shape}, {job.threads} threads\n")
    print_table(
        ("program", "prompt tokens a second", "against llama.cpp"),
        [
            (f"dllama, {kernels}", Figure.of(rate["dllama"]).text(), speedup.text(2, " ×")),
            ("llama.cpp", Figure.of(rate["llama.cpp"]).text(), "1"),
        ],
    )
    save(
        options.name or f"prefill-{options.shape}-{job.prompt}-{kernels}",
        {
            "question": "prefill",
            "shape": options.shape,
            "job": asdict(job),
            "kernels": kernels,
            "tokens_per_second": {name: asdict(Figure.of(values)) for name, values in rate.items()},
            "speedup": asdict(speedup),
            "rounds": {name: [asdict(each) for each in runs] for name, runs in rounds.items()},
        },
    )


if __name__ == "__main__":
    main()
