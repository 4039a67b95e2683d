"""What one node holds of a model, down to the rows and columns of every tensor."""

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from dllama.cluster.deal import kv_heads_of
from dllama.cluster.node import NodeSpec
from dllama.engine.memory import RUNTIME_BYTES, kv_bytes_per_token
from dllama.engine.shape import NodeShape
from dllama.formats import FloatType, ModelConfig, TensorInfo, tensor_kinds
from dllama.formats.blocks import BLOCK

SEGMENTS = {
    **dict.fromkeys(("attention_norm", "q", "k", "v", "q_norm", "k_norm", "o"), "attention"),
    **dict.fromkeys(("ffn_norm", "router", "w1", "w2", "w3"), "ffn"),
    **dict.fromkeys(("final_norm", "output"), "output"),
}
"""What of a step reads a kind of tensor. Of the embedding a step reads one row a token."""


class Slice(NamedTuple):
    """The part of a tensor ``[rows, columns]`` that a node holds."""

    rows: range
    columns: range


@dataclass(frozen=True)
class Share:
    """One node's part of a model.

    The ranges are those of neighbouring units; those of blocks and rows can be empty where nodes are many.
    """

    config: ModelConfig
    node: NodeSpec
    is_root: bool  # the root alone holds the embedding and samples
    heads: range  # query heads
    ffn_blocks: range  # blocks of 32 hidden values, of each expert's if there are; the last one may be short
    vocab: range  # rows of the output matrix
    sum_blocks: range  # blocks of 32 of the residual stream that it sums in a reduce-scatter

    @property
    def kv_heads(self) -> range:
        """The kv heads that its query heads read; the first and last may be held by others too."""
        return kv_heads_of(self.config, self.heads)

    @property
    def kv_head_of(self) -> tuple[int, ...]:
        """For each of its query heads, in order, which of its own kv heads it reads, counted from 0."""
        group = self.config.n_heads // self.config.n_kv_heads
        return tuple(head // group - self.kv_heads.start for head in self.heads)

    @property
    def hidden(self) -> range:
        """Its hidden values: rows of w1 and w3, columns of w2, the same of every expert."""
        return _values(self.ffn_blocks, self.config.ffn_dim)

    @property
    def sums(self) -> range:
        """The values of the residual stream that it sums in a reduce-scatter."""
        return _values(self.sum_blocks, self.config.dim)

    @property
    def shape(self) -> NodeShape:
        """Its sizes, as the engine wants them."""
        group = self.config.n_heads // self.config.n_kv_heads
        group_start = self.heads.start - self.kv_heads.start * group
        return NodeShape(len(self.heads), len(self.kv_heads), group_start, len(self.hidden), len(self.vocab))

    @cached_property
    def slices(self) -> dict[str, Slice]:
        """Its slice of each kind of tensor, the same in every layer; norms and routers are held whole.

        Column slices of quantised tensors begin and end between blocks. Only the root has rows of the embedding.
        """
        heads, kv_heads = self._head_values(self.heads), self._head_values(self.kv_heads)
        rows = {
            "embedding": range(self.config.vocab_size if self.is_root else 0),
            "q": heads,
            **dict.fromkeys(("k", "v"), kv_heads),
            **dict.fromkeys(("w1", "w3"), self.hidden),
            "output": self.vocab,
        }
        columns = {"o": heads, "w2": self.hidden}
        kinds = {kind.tensor.name: kind.tensor for kind in tensor_kinds(self.config)}
        return {
            name: Slice(rows.get(name, range(tensor.rows)), columns.get(name, range(tensor.columns)))
            for name, tensor in kinds.items()
        }

    def _head_values(self, heads: range) -> range:
        return range(heads.start * self.config.head_dim, heads.stop * self.config.head_dim)

    @cached_property
    def segment_bytes(self) -> dict[str, int]:
        """Bytes of weights that one token reads in "attention", "ffn" (both of all layers) and "output"."""
        sizes = dict.fromkeys(SEGMENTS.values(), 0)
        for tensor, _, active in tensor_kinds(self.config):
            if tensor.name in SEGMENTS:
                sizes[SEGMENTS[tensor.name]] += active * self._slice_bytes(tensor)
        return sizes

    @cached_property
    def weight_bytes(self) -> int:
        """Bytes of all that it holds but the embedding, which the root reads where its file is mapped."""
        kinds = tensor_kinds(self.config)
        return sum(count * self._slice_bytes(tensor) for tensor, count, _ in kinds if tensor.name in SEGMENTS)

    def _slice_bytes(self, tensor: TensorInfo) -> int:
        rows, columns = self.slices[tensor.name]
        return len(rows) * tensor.float_type.row_bytes(len(columns))

    def kv_bytes_per_position(self, kv_type: FloatType) -> int:
        """Bytes that one token takes in its KV caches, all layers together."""
        return kv_bytes_per_token(self.config, kv_type) // self.config.n_kv_heads * len(self.kv_heads)

    def memory_bytes(self, context: int, kv_type: FloatType) -> int:
        """Bytes of memory that it takes to run with a context of so many tokens."""
        return self.fixed_bytes(context) + self.weight_bytes + context * self.kv_bytes_per_position(kv_type)

    def fixed_bytes(self, context: int) -> int:
        """What of the memory is the same however small its share: the program, the rows of the embedding in use."""
        rows = min(self.config.vocab_size, context) if self.is_root else 0
        return RUNTIME_BYTES + rows * FloatType.F32.row_bytes(self.config.dim)


def _values(blocks: range, end: int) -> range:
    return range(min(blocks.start * BLOCK, end), min(blocks.stop * BLOCK, end))
