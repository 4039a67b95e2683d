"""Small models of random weights for the engine, in every shape that it has to run."""

from pathlib import Path

import numpy as np

from dllama.formats import Activation, Arch, FloatType, ModelConfig, ModelFile, ModelWriter, RopeType, tensor_layout

MHA = dict(
    arch=Arch.LLAMA, dim=64, hidden_dim=96, n_layers=2, n_heads=4, n_kv_heads=4, head_dim=16, vocab_size=70, seq_len=300
)  # fmt: skip
GQA = {**MHA, "n_heads": 10, "n_kv_heads": 2, "head_dim": 8, "dim": 80}
ODD = {**MHA, "n_heads": 3, "n_kv_heads": 3, "head_dim": 20, "dim": 60, "hidden_dim": 100, "vocab_size": 67}
MISTRAL = {**MHA, "n_kv_heads": 2, "head_dim": 36, "rope_theta": 1e6}
LLAMA3_1 = {
    **MHA,
    "n_heads": 8,
    "n_kv_heads": 2,
    "rope_type": RopeType.LLAMA3_1,
    "rope_theta": 500000.0,
    "rope_scaling_factor": 8.0,
    "rope_scaling_low_freq_factor": 1.0,
    "rope_scaling_high_freq_factor": 4.0,
    "rope_scaling_orig_seq_len": 16,
}
QWEN3 = {
    **MHA, "arch": Arch.QWEN3, "n_kv_heads": 1, "head_dim": 24, "rope_type": RopeType.HALF_SPLIT, "norm_epsilon": 1e-6,
}  # fmt: skip
QWEN3_MOE = {
    **QWEN3, "arch": Arch.QWEN3_MOE, "n_experts": 7, "n_active_experts": 3, "moe_hidden_dim": 36,
}  # fmt: skip
GELU = {**MHA, "activation": Activation.GELU}
SHAPES = {
    "mha": MHA, "gqa": GQA, "odd": ODD, "mistral": MISTRAL, "llama3.1": LLAMA3_1, "qwen3": QWEN3, "gelu": GELU,
    "qwen3-moe": QWEN3_MOE,
}  # fmt: skip

# All of them with rows of whole blocks of 32.
BLOCKED = {**GQA, "dim": 96, "head_dim": 16}
BLOCKED_MOE = {**QWEN3_MOE, "dim": 96, "moe_hidden_dim": 64, "head_dim": 16}


def random_model(path: Path, shape: dict, weight_type: FloatType = FloatType.F32, seed: int = 0) -> ModelFile:
    """Writes a model whose activations stay of order one, and opens it."""
    rng = np.random.default_rng(seed)
    config = ModelConfig(**{**shape, "weight_type": weight_type})
    with ModelWriter(path, config) as writer:
        for info in tensor_layout(config):
            values = rng.standard_normal((info.rows, info.columns)).astype(np.float32)
            if info.is_vector:
                values = 1 + values / 10
            elif info.name != "embedding":
                values *= 1.5 / np.sqrt(info.columns)
            writer.write(info.name, info.layer, values)
    return ModelFile(path)
