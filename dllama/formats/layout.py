"""Which tensors a `.m` file holds, in which order, and where."""

from collections.abc import Iterator
from dataclasses import dataclass

from dllama.formats.blocks import FloatType
from dllama.formats.config import Arch, ModelConfig


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a `.m` file: row-major ``[rows, columns]``, a product's ``[out, in]``; vectors have one row."""

    name: str
    layer: int | None  # None for the embedding, the final norm and the output matrix
    rows: int
    columns: int
    float_type: FloatType
    offset: int  # in bytes

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
    def shape(self) -> tuple[int, ...]:
        """(columns,) for a vector, (rows, columns) for a matrix."""
        return (self.columns,) if self.is_vector else (self.rows, self.columns)

    @property
    def label(self) -> str:
        """The tensor's name in messages, such as "q of layer 3"."""
        return self.name if self.layer is None else f"{self.name} of layer {self.layer}"


Entry = tuple[str, int, int, FloatType]  # name, rows, columns, type


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


def weights_bytes(config: ModelConfig) -> int:
    """Bytes of all tensors together, in one step however many layers the header claims."""
    return _nbytes(_head(config)) + config.n_layers * _nbytes(_layer(config)) + _nbytes(_tail(config))


def _nbytes(entries: list[Entry]) -> int:
    return sum(rows * float_type.row_bytes(columns) for _, rows, columns, float_type in entries)


def _head(config: ModelConfig) -> list[Entry]:
    return [("embedding", config.vocab_size, config.dim, FloatType.F32)]


def _layer(config: ModelConfig) -> list[Entry]:
    c, w = config, config.weight_type
    matrices = [
        ("q", c.q_dim, c.dim, w),
        ("k", c.kv_dim, c.dim, w),
        ("v", c.kv_dim, c.dim, w),
        ("o", c.dim, c.q_dim, w),
        ("w1", c.hidden_dim, c.dim, w),  # gate
        ("w2", c.dim, c.hidden_dim, w),  # down
        ("w3", c.hidden_dim, c.dim, w),  # up
    ]
    head_norms = [("q_norm", 1, c.head_dim, FloatType.F32), ("k_norm", 1, c.head_dim, FloatType.F32)]
    norms = [("attention_norm", 1, c.dim, FloatType.F32), ("ffn_norm", 1, c.dim, FloatType.F32)]
    return matrices + (head_norms if c.arch is Arch.QWEN3 else []) + norms


def _tail(config: ModelConfig) -> list[Entry]:
    return [
        ("final_norm", 1, config.dim, FloatType.F32),
        ("output", config.vocab_size, config.dim, config.weight_type),
    ]
