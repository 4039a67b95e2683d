"""Do both programs compute the same? A speed counts only if they do.

    python -m bench.agree --shape tinyllama-1.1b --prompt 200

Both read the same prompt with the same weights. Both round activations to 8 bits, though not at the same places, so
their logits differ a little; a wrong product, rotation or cache would make them differ by about their own size.
"""

import os

import llama_cpp
import numpy as np

from bench.harness import find_weights, job_of, question
from bench.report import print_table, save
from bench.runs import prompt_ids


def main() -> None:
    options = question(__doc__, prompt=200)
    job = job_of(options)
    weights = find_weights(options.shape, options.dir)
    ids = prompt_ids(job.prompt)
    if options.kernels:
        os.environ["DLLAMA_KERNELS"] = options.kernels  # read when dllama's kernels are imported, so not before
    from dllama import Llama

    peer = llama_cpp.Llama(str(weights.gguf), n_ctx=job.context, n_threads=job.threads, logits_all=True, verbose=False)
    peer.eval(ids)
    theirs = peer.scores[: len(ids)].copy()
    peer.close()
    llama = Llama(weights.model, weights.tokenizer, nthreads=job.threads, context=job.context)
    ours = llama.logits(ids)
    kernels = llama.kernels
    llama.close()

    error = np.linalg.norm(ours - theirs, axis=1) / np.linalg.norm(theirs, axis=1)
    same = float((ours.argmax(axis=1) == theirs.argmax(axis=1)).mean())
    print(f"\nLogits of {job.prompt} positions, {options.shape}, {kernels}\n")
    print_table(
        ("relative difference, median", "largest", "same best token"),
        [(f"{np.median(error):.4f}", f"{error.max():.4f}", f"{100 * same:.0f} %")],
    )
    save(
        options.name or f"agree-{options.shape}-{kernels}",
        {
            "question": "agree",
            "shape": options.shape,
            "prompt": job.prompt,
            "kernels": kernels,
            "relative_difference": {"median": float(np.median(error)), "largest": float(error.max())},
            "same_best_token": same,
        },
    )


if __name__ == "__main__":
    main()
