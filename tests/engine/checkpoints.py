"""Eight random checkpoints, the same on every machine, whose logits transformers has told.

The weights come from numpy's PCG64 generator, whose streams do not change between versions.
"""

from pathlib import Path

import numpy as np

from tests.converter.checkpoints import LLAMA as SMALL
from tests.converter.checkpoints import QWEN3 as SMALL_QWEN3
from tests.converter.checkpoints import QWEN3_MOE as SMALL_QWEN3_MOE
from tests.converter.checkpoints import shapes, write

RECORDED = Path(__file__).parent / "transformers_logits.npz"
TOKENS = 40

MHA = {**SMALL, "num_key_value_heads": 4}
GQA = {**SMALL, "num_attention_heads": 8, "num_key_value_heads": 2, "rms_norm_eps": 1e-6}
ODD = {**SMALL, "hidden_size": 60, "num_attention_heads": 3, "num_key_value_heads": 1, "intermediate_size": 100}
LLAMA3 = {
    **SMALL,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 16,
    },
}  # fmt: skip
QWEN3 = {**SMALL_QWEN3, "model_type": "qwen3"}
QWEN3_MOE = {**SMALL_QWEN3_MOE, "model_type": "qwen3_moe"}
TIED = {**SMALL, "tie_word_embeddings": True, "head_dim": 24}
LINEAR = {**SMALL, "rope_scaling": {"rope_type": "linear", "factor": 4.0}}
CONFIGS = {
    "mha": MHA, "gqa": GQA, "odd head size": ODD, "llama3 rope": LLAMA3, "linear rope": LINEAR, "tied": TIED,
    "qwen3": QWEN3, "qwen3-moe": QWEN3_MOE,
}  # fmt: skip


def build(name: str, folder: Path) -> Path:
    """Writes the checkpoint ``name`` into a folder, as transformers would."""
    return write(folder, CONFIGS[name], weights_of(name))


def weights_of(name: str) -> dict[str, np.ndarray]:
    """The tensors of the checkpoint ``name``; activations stay of order one."""
    config = CONFIGS[name]
    rng = np.random.default_rng([ord(letter) for letter in name])
    weights = {}
    for tensor, shape in sorted(shapes(config).items()):
        values = rng.standard_normal(shape)
        if len(shape) == 1:
            values = 1 + values / 10
        elif "embed_tokens" not in tensor:
            values *= 1.5 / np.sqrt(shape[1])
        weights[tensor] = values.astype(np.float32)
    return weights


def tokens(name: str) -> list[int]:
    """The text whose logits are compared."""
    return np.random.default_rng(7).integers(0, CONFIGS[name]["vocab_size"], TOKENS).tolist()


def logits_by_transformers(folder: Path, ids: list[int]) -> np.ndarray:
    """float32 [tokens, vocab]. Needs torch and transformers, which the tests do without otherwise."""
    import torch
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), f"{folder}: not loaded as it is: {info}"
    with torch.no_grad():
        return model.eval()(torch.tensor([ids])).logits[0].numpy()
