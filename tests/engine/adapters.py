"""Random adapters, and models merged with them for the reference to read."""

import numpy as np

from dllama.formats import ModelConfig, ModelFile
from dllama.lora import LoraAdapter
from dllama.targets import DENSE, TARGETS


def random_adapter(config: ModelConfig, seed: int, rank=5, targets=tuple(TARGETS), layers=(0, 1)) -> LoraAdapter:
    """One that adds about as much as the model's own matrices give; a mixture's experts are left alone."""
    rng = np.random.default_rng(seed)
    matrices = {}
    for layer in layers:
        for name in targets:
            if not (config.arch.has_experts and name in DENSE):
                inputs, outputs = (getattr(config, width) for width in TARGETS[name][2:])
                a = rng.standard_normal((rank, inputs), np.float32) / np.float32(np.sqrt(inputs))
                matrices[layer, name] = a, rng.standard_normal((outputs, rank), np.float32)
    return LoraAdapter(matrices, 3.0)


class Merged:
    """A model file whose matrices have an adapter added, as far as the reference reads it."""

    def __init__(self, file: ModelFile, adapter: LoraAdapter):
        self._file, self._adapter = file, adapter
        self.config, self.tensors = file.config, file.tensors
        self._targets = {target.matrix: name for name, target in TARGETS.items()}

    def f32(self, name: str, layer: int | None = None) -> np.ndarray:
        values = self._file.f32(name, layer)
        place = layer, self._targets.get(name)
        if place not in self._adapter.matrices:
            return values
        b = self._adapter.b_in_model(*place, self.config)
        return values + self._adapter.scale(*place) * b @ self._adapter.a(*place)
