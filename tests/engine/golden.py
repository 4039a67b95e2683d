"""What is recorded of the embedded model: the text it writes at temperature 0, and the perplexity of its F32 form."""

import math
from pathlib import Path

from dllama import Llama, SamplerSettings
from dllama.likelihood import negative_log_likelihood, windows

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = FOLDER / "embedded.json"
PROBLEMS = FOLDER / "problems.txt"
PROMPT = "Question: Tom has 3 apples"
STEPS = 64
EXACT = {"buffer_float_type": "f32", "kv_float_type": "f32"}


def generate(prompt: str, steps: int) -> dict:
    """The text and the token ids that follow the prompt, as dllama runs by default."""
    with Llama(buffer_float_type="q80", kv_float_type="f16") as llama:
        pieces = list(llama.generate(prompt, steps, SamplerSettings(temperature=0)))
    return {"text": "".join(piece.text for piece in pieces), "token_ids": [piece.token_id for piece in pieces]}


def perplexity(*files: Path, **float_types: str) -> float:
    """Per token of problems.txt; of the embedded model, or of the model and tokenizer in ``files``."""
    total = count = 0
    with Llama(*files, **float_types) as llama:
        tokens = llama.tokenizer.encode(PROBLEMS.read_text(encoding="utf-8"), bos=False)
        for fed, predicted in windows(tokens, llama.tokenizer.encode(""), llama.context, llama.context):
            total += negative_log_likelihood(llama.logits(fed), predicted)
            count += len(predicted)
    return math.exp(total / count)
