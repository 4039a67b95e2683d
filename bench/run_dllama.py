"""One run of dllama, through its Python API: `Llama(model, tokenizer).generate(ids)`, text pieces and all."""

import time

from bench.runs import measure, run_arguments
from dllama import Llama, SamplerSettings


def main() -> None:
    options, job = run_arguments()
    llama = Llama(options.model, options.tokenizer, nthreads=job.threads, context=job.context)
    greedy = SamplerSettings(temperature=0.0)

    def generate(prompt: list[int], tokens: int) -> list[float]:
        times, start = [], time.perf_counter()
        for _ in llama.generate(prompt, steps=1 + tokens, sampler=greedy):
            now = time.perf_counter()
            times.append((now - start) * 1e3)
            start = now
        if len(times) != 1 + tokens:
            raise SystemExit(f"generation stopped early: {llama.stop_reason}")
        return times

    measure("dllama", job, options.started, llama.kernels, generate)
    llama.close()


if __name__ == "__main__":
    main()
