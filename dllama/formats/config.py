"""The shape of a model: what the header of a `.m` file says, checked."""

import enum
from dataclasses import dataclass

from dllama.formats.blocks import BLOCK, FloatType

MAX_DIM = 1 << 20
MAX_LAYERS = 1 << 14
MAX_VOCAB = 1 << 24
MAX_SEQ_LEN = 1 << 26
MAX_EXPERTS = 1 << 16  # of all layers together


class Arch(enum.IntEnum):
    """Architectures, numbered as in the `.m` header."""

    LLAMA = 0xABCD00
    QWEN3 = 0xABCD01
    QWEN3_MOE = 0xABCD02

    @property
    def is_qwen3(self) -> bool:
        """Whether heads are normed, and rotary pairs half-split."""
        return self is not Arch.LLAMA

    @property
    def has_experts(self) -> bool:
        """Whether a layer's feed-forward network is a mixture of experts."""
        return self is Arch.QWEN3_MOE


class RopeType(enum.IntEnum):
    """Which elements of a head rotary embedding turns together, and whether its frequencies are scaled."""

    LLAMA = 0  # pairs (2i, 2i+1)
    HALF_SPLIT = 1  # pairs (i, i + head_dim/2)
    LLAMA3_1 = 2  # pairs (2i, 2i+1), frequencies scaled as Llama 3.1 does


class Activation(enum.IntEnum):
    """The function between the two products of the feed-forward network."""

    GELU = 0
    SILU = 1


@dataclass(frozen=True)
class ModelConfig:
    """Shape and constants of one model. Raises ValueError, with the reason, for a shape that cannot exist."""

    arch: Arch
    dim: int  # width of the residual stream
    hidden_dim: int  # width between the products of a dense feed-forward network; a mixture has none of this width
    n_layers: int
    n_heads: int
    n_kv_heads: int  # divides n_heads; fewer than n_heads is grouped-query attention
    head_dim: int
    vocab_size: int
    seq_len: int  # longest context, in tokens
    norm_epsilon: float = 1e-5
    rope_theta: float = 10000.0
    rope_type: RopeType = RopeType.LLAMA
    rope_scaling_factor: float = 0.0  # the four scaling values are 0 unless rope_type is LLAMA3_1
    rope_scaling_low_freq_factor: float = 0.0
    rope_scaling_high_freq_factor: float = 0.0
    rope_scaling_orig_seq_len: int = 0
    weight_type: FloatType = FloatType.Q40  # of every matrix but the embedding, which is F32
    activation: Activation = Activation.SILU
    n_experts: int = 0  # of each layer; the three values are 0 unless the architecture has experts
    n_active_experts: int = 0  # that work on a token: those that its router likes best
    moe_hidden_dim: int = 0  # width between the products of an expert

    @property
    def ffn_dim(self) -> int:
        """Width between the products of the feed-forward network, or of each expert of a mixture."""
        return self.moe_hidden_dim if self.arch.has_experts else self.hidden_dim

    @property
    def q_dim(self) -> int:
        """Values in the queries of one token, and in the heads' outputs."""
        return self.n_heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        """Values in the keys, or in the values, of one token."""
        return self.n_kv_heads * self.head_dim

    def __post_init__(self):
        for name, largest in (
            ("dim", MAX_DIM),
            ("hidden_dim", MAX_DIM),
            ("n_layers", MAX_LAYERS),
            ("n_heads", MAX_DIM),
            ("n_kv_heads", MAX_DIM),
            ("head_dim", MAX_DIM),
            ("vocab_size", MAX_VOCAB),
            ("seq_len", MAX_SEQ_LEN),
        ):
            _check_range(name, getattr(self, name), 1, largest)
        if self.n_heads % self.n_kv_heads:
            raise ValueError(f"{self.n_heads} heads cannot be shared by {self.n_kv_heads} kv heads")
        if self.head_dim % 2:
            raise ValueError(f"head_dim is {self.head_dim}, and rotary embedding turns pairs: it must be even")
        _check_range("n_heads * head_dim", self.q_dim, 1, MAX_DIM)
        self._check_experts()
        if self.weight_type.is_quantized:
            ffn = "moe_hidden_dim" if self.arch.has_experts else "hidden_dim"
            for name, size in (("dim", self.dim), (ffn, self.ffn_dim), ("n_heads * head_dim", self.q_dim)):
                if size % BLOCK:
                    raise ValueError(f"{name} is {size}, and {self.weight_type.name} rows need a multiple of {BLOCK}")
        if not 0 < self.norm_epsilon < 1:
            raise ValueError(f"norm_epsilon is {self.norm_epsilon}, not between 0 and 1")
        if not 1 <= self.rope_theta < 1 << 31:
            raise ValueError(f"rope_theta is {self.rope_theta}, not between 1 and {(1 << 31) - 1}")
        self._check_rope()

    def _check_experts(self) -> None:
        if not self.arch.has_experts:
            for name in ("n_experts", "n_active_experts", "moe_hidden_dim"):
                if getattr(self, name) != 0:
                    raise ValueError(f"{name} is {getattr(self, name)}, and {self.arch.name.lower()} has no experts")
            return
        _check_range("n_experts", self.n_experts, 1, MAX_EXPERTS)
        _check_range("n_layers * n_experts", self.n_layers * self.n_experts, 1, MAX_EXPERTS)
        _check_range("n_active_experts", self.n_active_experts, 1, self.n_experts)
        _check_range("moe_hidden_dim", self.moe_hidden_dim, 1, MAX_DIM)

    def _check_rope(self) -> None:
        if self.arch.is_qwen3 and self.rope_type is not RopeType.HALF_SPLIT:
            raise ValueError(f"qwen3 turns half-split pairs, and the rope type is {self.rope_type.name}")
        factor, low, high = (
            self.rope_scaling_factor,
            self.rope_scaling_low_freq_factor,
            self.rope_scaling_high_freq_factor,
        )
        if self.rope_type is not RopeType.LLAMA3_1:
            if (factor, low, high, self.rope_scaling_orig_seq_len) != (0, 0, 0, 0):
                raise ValueError(f"rope scaling values belong to rope type LLAMA3_1, not {self.rope_type.name}")
            return
        if not 1 <= factor <= 1 << 20:
            raise ValueError(f"rope_scaling_factor is {factor}, not between 1 and {1 << 20}")
        if not 0 < low < high <= 1 << 20:
            raise ValueError(
                f"rope_scaling_low_freq_factor {low} and rope_scaling_high_freq_factor {high}:"
                " the first must be above 0 and below the second"
            )
        _check_range("rope_scaling_orig_seq_len", self.rope_scaling_orig_seq_len, 1, MAX_SEQ_LEN)


def _check_range(name: str, value: int, smallest: int, largest: int) -> None:
    if not smallest <= value <= largest:
        raise ValueError(f"{name} is {value}, not between {smallest} and {largest}")
