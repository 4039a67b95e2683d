"""One run of llama.cpp, through llama-cpp-python's low-level functions, so that no Python sampling or text counts.

The library's own defaults (memory map, weight repacking, flash attention, 16-bit cache) stay; only the context's
length and the threads are given.
"""

import ctypes
import time

import llama_cpp as lib
import numpy as np

from bench.runs import measure, run_arguments

quiet = lib.llama_log_callback(lambda level, text, data: None)


def main() -> None:
    options, job = run_arguments()
    lib.llama_log_set(quiet, ctypes.c_void_p(0))
    lib.llama_backend_init()
    model = lib.llama_model_load_from_file(options.model.encode(), lib.llama_model_default_params())
    if not model:
        raise SystemExit(f"{options.model}: llama.cpp cannot load it")
    params = lib.llama_context_default_params()
    params.n_ctx = job.context
    params.n_threads = params.n_threads_batch = job.threads
    context = lib.llama_init_from_model(model, params)
    vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))

    def decode(ids: list[int]) -> int:
        tokens = (lib.llama_token * len(ids))(*ids)
        if lib.llama_decode(context, lib.llama_batch_get_one(tokens, len(ids))):
            raise SystemExit("llama_decode failed")
        logits = np.ctypeslib.as_array(lib.llama_get_logits_ith(context, -1), (vocab_size,))
        return int(logits.argmax())

    def generate(prompt: list[int], tokens: int) -> list[float]:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        times, ids = [], prompt
        for _ in range(1 + tokens):
            start = time.perf_counter()
            ids = [decode(ids)]
            times.append((time.perf_counter() - start) * 1e3)
        return times

    measure("llama.cpp", job, options.started, lib.llama_print_system_info().decode(), generate)


if __name__ == "__main__":
    main()
