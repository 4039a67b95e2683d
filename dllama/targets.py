"""The matrices of a layer that an adapter may add to, by the names that adapters have for them."""

from typing import NamedTuple


class Target(NamedTuple):
    """A matrix of every layer. ``inputs`` and ``outputs`` name its widths, attributes of ``ModelConfig``."""

    matrix: str  # its name in a `.m` file
    module: str  # its path inside a layer of transformers' models
    inputs: str
    outputs: str


TARGETS = {
    "q": Target("q", "self_attn.q_proj", "dim", "q_dim"),
    "k": Target("k", "self_attn.k_proj", "dim", "kv_dim"),
    "v": Target("v", "self_attn.v_proj", "dim", "kv_dim"),
    "o": Target("o", "self_attn.o_proj", "q_dim", "dim"),
    "gate": Target("w1", "mlp.gate_proj", "dim", "hidden_dim"),
    "up": Target("w3", "mlp.up_proj", "dim", "hidden_dim"),
    "down": Target("w2", "mlp.down_proj", "hidden_dim", "dim"),
}


DENSE = ("gate", "up", "down")
"""Targets that a mixture of experts has none of, or rather many of."""


def parse_targets(text: str) -> tuple[str, ...]:
    """The targets named in ``text``, separated by commas, in the order of TARGETS; ValueError for what is none."""
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in TARGETS:
            raise ValueError(f"{name or 'nothing'} is no target (known: {', '.join(TARGETS)})")
        if names.count(name) > 1:
            raise ValueError(f"{name} is named twice")
    return tuple(name for name in TARGETS if name in names)
