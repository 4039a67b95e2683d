"""A model's weights as the compiled stages see them: addresses into the memory map."""

import numpy as np

from dllama.engine.stages import LAYER
from dllama.formats import ModelFile
from dllama.kernels import tags

MATRICES = ("q", "k", "v", "o", "w1", "w2", "w3")


class Weights:
    """Addresses of a model file's tensors. Matrices stay where they are mapped; norms are copied and padded.

    ``tag``: the matrices' format; ``layers``: a ``LAYER`` record for each layer; ``embedding``: float32 [vocab, dim].
    """

    def __init__(self, model: ModelFile):
        config = model.config
        self.tag = tags.BY_NAME[config.weight_type.name.lower()]
        self._kept = []
        self.embedding = model.f32("embedding")
        self.final_norm = self._norm(model.f32("final_norm"))
        self.output = self._address(model.raw("output"))
        self.layers = np.zeros(config.n_layers, LAYER)
        present = {info.name for info in model.tensors()}
        for index, layer in enumerate(self.layers):
            for name in MATRICES:
                layer[name] = self._address(model.raw(name, index))
            for name in present & {"attention_norm", "ffn_norm", "q_norm", "k_norm"}:
                layer[name] = self._norm(model.f32(name, index))
        self.dim_bytes = config.weight_type.row_bytes(config.dim)
        self.q_bytes = config.weight_type.row_bytes(config.q_dim)
        self.hidden_bytes = config.weight_type.row_bytes(config.hidden_dim)

    def _address(self, array: np.ndarray) -> int:
        self._kept.append(array)
        return array.ctypes.data

    def _norm(self, values: np.ndarray) -> int:
        padded = np.zeros(-(-len(values) // 32) * 32, np.float32)
        padded[: len(values)] = values
        return self._address(padded)
