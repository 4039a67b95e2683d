"""Shapes of models with heads enough for seven nodes, quantised weights included, and a mixture of experts."""

from tests.engine.models import MHA, QWEN3_MOE

VOCAB = 400
WIDE = {**MHA, "dim": 128, "hidden_dim": 352, "head_dim": 32, "vocab_size": VOCAB}
SHAPES = {
    "mha": {**WIDE, "n_heads": 8, "n_kv_heads": 8},
    "gqa": {**WIDE, "n_heads": 16, "n_kv_heads": 8},
    "few kv heads": {**WIDE, "n_heads": 14, "n_kv_heads": 2},
}
EXPERTS = {
    **QWEN3_MOE, "dim": 128, "n_heads": 8, "n_kv_heads": 4, "head_dim": 32, "vocab_size": VOCAB, "moe_hidden_dim": 96,
}  # fmt: skip
