"""Which tensors a `.m` file holds, in which order, and where."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import NamedTuple

from dllama.formats.blocks import FloatType
from dllama.formats.config import ModelConfig


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a `.m` file: row-major ``[rows, columns]``, a product's ``[out, in]``; vectors have one row."""

    name: str  # none twice in a layer: an expert's matrices have its number behind a dot, such as "w1.17"
    layer: int | None  # None for the embedding, the final norm and the output matrix
    rows: int
    columns: int
    float_type: FloatType
    offset: int  # in bytes

    @property
    def kind(self) -> str:
        """The name without an expert's number. Tensors of a kind are of one shape and type, in all layers."""
        return self.name.partition(".")[0]

    @property
    def expert(self) -> int | None:
        """Number of the expert that it belongs to."""
        number = self.name.partition(".")[2]
        return int(number) if number else None

    @property
    def row_bytes(self) -> int:
        return self.float_type.row_bytes(self.columns)

    @property
    def nbytes(self) -> int:
        return self.rows * self.row_bytes

    @property
    def is_vector(self) -> bool:
        return self.name.endswith("norm")

    @property
    def is_whole(self) -> bool:
        """Whether every node of a cluster holds all of it: norms, and the routers of experts."""
        return self.is_vector or self.name == "router"

    @property
    def shape(self) -> tuple[int, ...]:
        """(columns,) for a vector, (rows, columns) for a matrix."""
        return (self.columns,) if self.is_vector else (self.rows, self.columns)

    @property
    def label(self) -> str:
        """The tensor's name in messages, such as "q of layer 3" or "w1.17 of layer 3"."""
        return self.name if self.layer is None else f"{self.name} of layer {self.layer}"


Entry = tuple[str, int, int, FloatType]  # name, rows, columns, type


class Kind(NamedTuple):
    """All tensors of one kind: one of them, without an expert's number, and how many there are of it."""

    tensor: TensorInfo
    count: int
    active: int  # of these, how many a token is multiplied with


def expert_name(kind: str, expert: int) -> str:
    """The name of an expert's matrix, w1, w2 or w3."""
    return f"{kind}.{expert}"


def tensor_layout(config: ModelConfig, header_bytes: int = 0) -> Iterator[TensorInfo]:
    """Every tensor of the file, in file order, the first at ``header_bytes`` (0: offsets count from the weights)."""
    offset = header_bytes
    head, layer_entries, tail = _head(config), _layer(config), _tail(config)
    sections = [(None, head), *((layer, layer_entries) for layer in range(config.n_layers)), (None, tail)]
    for layer, entries in sections:
        for name, rows, columns, float_type in entries:
            info = TensorInfo(name, layer, rows, columns, float_type, offset)
            yield info
            offset += info.nbytes


@lru_cache(maxsize=8)
def tensor_kinds(config: ModelConfig) -> tuple[Kind, ...]:
    """Every kind of tensor of the file, in file order; the offsets of the tensors have no meaning."""
    kinds = {}
    for tensor in tensor_layout(replace(config, n_layers=1)):
        count = active = 1 if tensor.layer is None else config.n_layers
        if tensor.expert is not None:
            count, active = count * config.n_experts, active * config.n_active_experts
        kinds.setdefault(tensor.kind, Kind(replace(tensor, name=tensor.kind), count, active))
    return tuple(kinds.values())


def weights_bytes(config: ModelConfig) -> int:
    """Bytes of all tensors together, in no more steps however many layers the header claims."""
    return sum(kind.count * kind.tensor.nbytes for kind in tensor_kinds(config))


def _head(config: ModelConfig) -> list[Entry]:
    return [("embedding", config.vocab_size, config.dim, FloatType.F32)]


def _layer(config: ModelConfig) -> list[Entry]:
    c, w = config, config.weight_type
    attention = [
        ("q", c.q_dim, c.dim, w),
        ("k", c.kv_dim, c.dim, w),
        ("v", c.kv_dim, c.dim, w),
        ("o", c.dim, c.q_dim, w),
    ]
    ffn = [
        ("w1", c.ffn_dim, c.dim, w),  # gate
        ("w2", c.dim, c.ffn_dim, w),  # down
        ("w3", c.ffn_dim, c.dim, w),  # up
    ]
    if c.arch.has_experts:
        router = ("router", c.n_experts, c.dim, FloatType.F32)
        ffn = [router, *((expert_name(name, expert), *rest) for expert in range(c.n_experts) for name, *rest in ffn)]
    head_norms = [("q_norm", 1, c.head_dim, FloatType.F32), ("k_norm", 1, c.head_dim, FloatType.F32)]
    norms = [("attention_norm", 1, c.dim, FloatType.F32), ("ffn_norm", 1, c.dim, FloatType.F32)]
    return attention + ffn + (head_norms if c.arch.is_qwen3 else []) + norms


def _tail(config: ModelConfig) -> list[Entry]:
    return [
        ("final_norm", 1, config.dim, FloatType.F32),
        ("output", config.vocab_size, config.dim, config.weight_type),
    ]
