"""The memory of one sequence: keys and values of every layer, head and position it has seen."""

from dllama.engine.adapters import NO_ADAPTER
from dllama.engine.pages import anonymous
from dllama.formats import ModelConfig
from dllama.kernels import tags
from dllama.kernels.attention import cache_row_bytes


class KVCache:
    """Room for ``capacity`` positions of ``kv_heads`` heads in some layers, taken from the system as they are written.

    Layout: keys, then values, each [layer, kv head, position, bytes of a row].

    ``adapter``: number of the one that they are made with, NO_ADAPTER for none
    """

    def __init__(
        self,
        config: ModelConfig,
        n_layers: int,
        kv_heads: int,
        capacity: int,
        cache: tags.Tag,
        adapter: int = NO_ADAPTER,
    ):
        self.capacity, self.adapter = capacity, adapter
        self.head_stride = capacity * cache_row_bytes(cache, config.head_dim)
        self.layer_stride = kv_heads * self.head_stride
        self.nbytes = 2 * n_layers * self.layer_stride
        self._memory = anonymous(self.nbytes, huge=False)
        self.keys = self._memory.ctypes.data
        self.values = self.keys + n_layers * self.layer_stride
