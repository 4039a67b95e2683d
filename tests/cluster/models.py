"""Model shapes for the plan: some well-known, and any at all."""

import math

from hypothesis import strategies as st

from dllama.cluster.node import NodeSpec
from dllama.formats import Arch, FloatType, ModelConfig, RopeType


def config(**shape) -> ModelConfig:
    return ModelConfig(arch=Arch.LLAMA, **shape)


LLAMA2_7B = config(
    dim=4096, hidden_dim=11008, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, vocab_size=32000, seq_len=4096
)
LLAMA3_8B = config(
    dim=4096, hidden_dim=14336, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, vocab_size=128256, seq_len=8192
)
SMALL = config(
    dim=512, hidden_dim=1536, n_layers=8, n_heads=8, n_kv_heads=4, head_dim=64, vocab_size=4096, seq_len=2048
)
QWEN3_30B_A3B = ModelConfig(
    arch=Arch.QWEN3_MOE, dim=2048, hidden_dim=6144, n_layers=48, n_heads=32, n_kv_heads=4, head_dim=128,
    vocab_size=151936, seq_len=40960, norm_epsilon=1e-6, rope_theta=1e6, rope_type=RopeType.HALF_SPLIT,
    n_experts=128, n_active_experts=8, moe_hidden_dim=768,
)  # fmt: skip
EXPERTS = ModelConfig(
    arch=Arch.QWEN3_MOE, dim=64, hidden_dim=192, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, vocab_size=512,
    seq_len=256, rope_type=RopeType.HALF_SPLIT, n_experts=6, n_active_experts=2, moe_hidden_dim=160,
)  # fmt: skip
TINY = config(dim=64, hidden_dim=192, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=32, vocab_size=512, seq_len=256)


@st.composite
def configs(draw) -> ModelConfig:
    """Any shape that a model can have, odd sizes included where the weights are not quantised."""
    weight_type = draw(st.sampled_from(list(FloatType)))
    head_dim = 2 * draw(st.integers(1, 40))
    group, n_kv_heads = draw(st.integers(1, 6)), draw(st.integers(1, 8))
    unit = 1
    if weight_type.is_quantized:
        unit = 32
        n_kv_heads *= math.lcm(head_dim * group, 32) // (head_dim * group)
    arch, mixture = draw(st.sampled_from(Arch)), {}
    if arch.has_experts:
        mixture = {"n_experts": draw(st.integers(1, 5)), "moe_hidden_dim": unit * draw(st.integers(1, 300 // unit))}
        mixture["n_active_experts"] = draw(st.integers(1, mixture["n_experts"]))
    return ModelConfig(
        arch=arch,
        dim=unit * draw(st.integers(1, 300 // unit)),
        hidden_dim=unit * draw(st.integers(1, 900 // unit)),
        n_layers=draw(st.integers(1, 3)),
        n_heads=n_kv_heads * group,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        vocab_size=draw(st.integers(1, 2000)),
        seq_len=draw(st.integers(1, 500)),
        rope_type=RopeType.HALF_SPLIT,
        weight_type=weight_type,
        **mixture,
    )


def equal_nodes(count: int, **figures) -> list[NodeSpec]:
    return [NodeSpec(f"node{i}", **figures) for i in range(count)]
