"""How much of a model one node works."""

from __future__ import annotations

from dataclasses import dataclass

from dllama.formats import ModelConfig


@dataclass(frozen=True)
class NodeShape:
    """Sizes of a node's slice. ``group_start``: query heads of its first kv head that nodes before it have."""

    n_heads: int
    n_kv_heads: int
    group_start: int
    hidden_dim: int  # of the feed-forward network, or of each expert
    vocab_size: int

    @classmethod
    def whole(cls, config: ModelConfig) -> NodeShape:
        """All of a model."""
        return cls(config.n_heads, config.n_kv_heads, 0, config.ffn_dim, config.vocab_size)
