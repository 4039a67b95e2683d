"""A model's shape, for programs and for people."""

import enum
from dataclasses import asdict

from dllama.formats.config import ModelConfig


def shape(config: ModelConfig) -> dict:
    """Every field of the configuration under its own name; enumerations by their names in lower case."""
    return {
        name: value.name.lower() if isinstance(value, enum.Enum) else value for name, value in asdict(config).items()
    }


def describe(config: ModelConfig) -> str:
    """The shape in one line."""
    ffn = f"hidden dim {config.ffn_dim}"
    if config.arch.has_experts:
        ffn += f" of each of {config.n_experts} experts, {config.n_active_experts} at a time"
    return (
        f"{config.arch.name.lower()}, {config.n_layers} layers, dim {config.dim}, {ffn}, "
        f"{config.n_heads} heads, {config.n_kv_heads} kv heads, vocabulary {config.vocab_size}, "
        f"{config.weight_type.name.lower()} weights"
    )
