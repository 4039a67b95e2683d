"""Small models for tests: shapes, and files of random weights."""

import numpy as np

from dllama.formats import Arch, FloatType, ModelConfig, ModelWriter, RopeType, tensor_layout

LLAMA = dict(
    arch=Arch.LLAMA, dim=64, hidden_dim=96, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=24, vocab_size=50, seq_len=77
)  # fmt: skip
QWEN3 = {**LLAMA, "arch": Arch.QWEN3, "rope_type": RopeType.HALF_SPLIT, "norm_epsilon": 1e-6, "rope_theta": 1e6}
LLAMA3_1 = {
    **LLAMA,
    "rope_type": RopeType.LLAMA3_1,
    "rope_scaling_factor": 8.0,
    "rope_scaling_low_freq_factor": 1.0,
    "rope_scaling_high_freq_factor": 4.0,
    "rope_scaling_orig_seq_len": 32,
}
QWEN3_MOE = {**QWEN3, "arch": Arch.QWEN3_MOE, "n_experts": 5, "n_active_experts": 2, "moe_hidden_dim": 32}
SHAPES = {"llama": LLAMA, "qwen3": QWEN3, "llama3.1": LLAMA3_1, "qwen3-moe": QWEN3_MOE}


def config(shape: dict = LLAMA, weight_type: FloatType = FloatType.Q40, **changes) -> ModelConfig:
    return ModelConfig(**{**shape, "weight_type": weight_type, **changes})


def random_tensors(model: ModelConfig, seed: int = 0) -> dict[tuple, np.ndarray]:
    """(name, layer) -> float32 values, in file order."""
    rng = np.random.default_rng(seed)
    return {(i.name, i.layer): rng.standard_normal(i.shape, dtype=np.float32) for i in tensor_layout(model)}


def write_random(path, model: ModelConfig, seed: int = 0) -> dict[tuple, np.ndarray]:
    """Write a model of random weights; its values before they were quantised."""
    tensors = random_tensors(model, seed)
    with ModelWriter(path, model) as writer:
        for (name, layer), values in tensors.items():
            writer.write(name, layer, values)
    return tensors
