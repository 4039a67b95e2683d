"""Rotary position embedding: the angles that queries and keys are turned by (Su et al., 2021)."""

import numpy as np

from dllama.formats import ModelConfig, RopeType


def frequencies(config: ModelConfig) -> np.ndarray:
    """float64 [head_dim / 2]: radians per position for each pair, theta^(-2i/head_dim), scaled where Llama 3.1 does.

    The scaling (Llama 3.1's own reference code) divides frequencies whose wavelength is longer than the original
    context over ``low_freq_factor``, keeps those shorter than it over ``high_freq_factor``, and blends between.
    """
    pairs = np.arange(config.head_dim // 2)
    plain = float(config.rope_theta) ** (-2.0 * pairs / config.head_dim)
    if config.rope_type is not RopeType.LLAMA3_1:
        return plain
    low, high = config.rope_scaling_low_freq_factor, config.rope_scaling_high_freq_factor
    turns = config.rope_scaling_orig_seq_len * plain / (2 * np.pi)  # over the original context
    blend = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return plain * (blend + (1 - blend) / config.rope_scaling_factor)
