"""What does quantisation cost? Perplexity of a checkpoint in float32, and as it is run.

    python -m bench.quality --hf FOLDER                          # a Hugging Face checkpoint with its tokenizer.model
    python -m bench.quality --hf FOLDER --text STORY.txt
    python -m bench.quality --hf FOLDER --imatrix FILE           # ... and with Q40 weights of least error by importance

The checkpoint is converted into a temporary folder, as F32, as Q80 and as Q40 in every way, and each form predicts the
same text: the GSM8K problems of a .jsonl file, each on its own between the tokens that begin and end a text, or any
other text file in windows as long as the context. Problems longer than the context are left out.
"""

import argparse
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.report import print_table, save
from converter.convert import Settings, convert
from dllama import Llama
from dllama.formats import FloatType
from dllama.likelihood import negative_log_likelihood, windows
from dllama.tokenizer import Tokenizer
from dllama.train.corpus import read_problems

# name: how weights are stored, buffers, KV cache. The first is what the others are compared with.
Q40 = Settings(FloatType.Q40)
FORMS = {
    "F32": (Settings(FloatType.F32), "f32", "f32"),
    "Q40, buffers Q80, cache F16": (Q40, "q80", "f16"),
    "Q40, buffers F32, cache F32": (Q40, "f32", "f32"),
    "Q40, buffers Q80, cache Q80": (Q40, "q80", "q80"),
    "reference's Q40, buffers Q80, cache F16": (Settings(FloatType.Q40, reference=True), "q80", "f16"),
    "Q80, buffers Q80, cache F16": (Settings(FloatType.Q80), "q80", "f16"),
}


def pieces(path: Path, tokenizer: Tokenizer, context: int, limit: int) -> Iterator[tuple[list[int], list[int]]]:
    """The tokens to feed and the tokens to predict, as ``dllama.cli.perplexity.windows`` gives them."""
    if path.suffix != ".jsonl":
        tokens, head = tokenizer.encode(path.read_text(encoding="utf-8"), bos=False), tokenizer.encode("")
        yield from windows(tokens, head, context, context)
        return
    for problem in read_problems(path)[:limit]:
        tokens = [*tokenizer.encode(problem), *tokenizer.eos_ids[:1]]
        if len(tokens) <= context:
            yield tokens[:-1], tokens[1:]


def perplexity(llama: Llama, path: Path, limit: int) -> tuple[float, int]:
    """Per token, and the number of tokens that were predicted."""
    total = count = 0
    for fed, predicted in pieces(path, llama.tokenizer, llama.context, limit):
        total += negative_log_likelihood(llama.logits(fed), predicted)
        count += len(predicted)
    if not count:
        raise SystemExit(f"{path}: nothing to predict in a context of {llama.context} tokens")
    return math.exp(total / count), count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, metavar="FOLDER", help="checkpoint folder")
    parser.add_argument("--text", type=Path, default=Path("../shared/data/gsm8k_test.jsonl"), metavar="FILE")
    parser.add_argument("--problems", type=int, default=300, help="of a .jsonl file, default %(default)s")
    parser.add_argument("--imatrix", type=Path, metavar="FILE", help="importance matrix, of another text than --text")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--name", default="quality", help="name of the results file, without .json")
    options = parser.parse_args()

    forms = dict(FORMS)
    if options.imatrix:
        weighed = Settings(FloatType.Q40, imatrix=options.imatrix)
        forms["Q40 by importance, buffers Q80, cache F16"] = weighed, "q80", "f16"
    found, models = {}, {}
    with tempfile.TemporaryDirectory() as scratch:
        for name, (settings, buffers, cache) in forms.items():
            model = models.setdefault(settings, Path(scratch, f"{len(models)}.m"))
            if not model.exists():
                convert(options.hf, model, settings)
            with Llama(
                model,
                options.hf / "tokenizer.model",
                nthreads=options.threads,
                buffer_float_type=buffers,
                kv_float_type=cache,
            ) as llama:
                found[name], tokens = perplexity(llama, options.text, options.problems)
                kernels = llama.kernels
    ratios = {name: value / found["F32"] for name, value in found.items()}

    print(f"\nPerplexity of {options.hf.name} on {tokens} tokens of {options.text.name}, {kernels} kernels\n")
    rows = [(name, f"{found[name]:.4f}", f"{100 * (ratios[name] - 1):+.2f} %") for name in forms]
    print_table(("weights", "perplexity per token", "against F32"), rows)
    save(
        options.name,
        {
            "question": "quality",
            "text": options.text.name,
            "tokens": tokens,
            "imatrix": options.imatrix and options.imatrix.name,
            "kernels": kernels,
            "perplexity": found,
            "against_f32": ratios,
        },
    )


if __name__ == "__main__":
    main()
