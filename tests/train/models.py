"""A tiny model of random weights in a folder, and the bytes of words as its vocabulary."""

from pathlib import Path

import numpy as np

from dllama.train.examples import Example
from tests.engine.checkpoints import CONFIGS, build

NAME = "gqa"
VOCABULARY = CONFIGS[NAME]["vocab_size"]


def tiny_model(folder: Path, name: str = NAME):
    """A model of transformers, float32, built anew at each call; nothing in it is trained."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(1)  # more of them cost more than they bring in a model so small
    if not folder.exists():
        build(name, folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).requires_grad_(False).eval()


def random_examples(n: int, seed: int = 0) -> list[Example]:
    """Prompts and answers of random tokens, of several lengths."""
    rng = np.random.default_rng(seed)
    examples = []
    for _ in range(n):
        prompt, answer = rng.integers(2, 9), rng.integers(1, 6)
        learnt = np.arange(prompt + answer) >= prompt
        examples.append(Example(rng.integers(0, VOCABULARY, prompt + answer), learnt))
    return examples
