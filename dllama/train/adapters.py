"""The modules that are trained: what PrivateLoRA and LoRA add to the matrices of a model that stays as it is."""

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel

from dllama.errors import ModelError
from dllama.lora import LoraAdapter
from dllama.privatelora.adapter import CloudAdapter, EdgeAdapter
from dllama.privatelora.shape import AdapterShape, Place
from dllama.targets import TARGETS


class PrivateLoraLinear(nn.Module):
    """``W·x + B·M·A·x``, only M being trained; it begins as zero.

    a: float32 [r_c2d, inputs];  b: float32 [outputs, r_d2c]
    """

    def __init__(self, base: nn.Linear, a: np.ndarray, b: np.ndarray):
        super().__init__()
        weight = base.weight
        self.base = base
        self.register_buffer("a", torch.from_numpy(a).to(weight), persistent=False)
        self.register_buffer("b", torch.from_numpy(b).to(weight), persistent=False)
        self.m = nn.Parameter(torch.zeros(b.shape[1], a.shape[0], device=weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]"""
        answer = F.linear(F.linear(x, self.a), self.m.to(x.dtype))  # what the device gives back
        return self.base(x) + F.linear(answer, self.b)


class LoraLinear(nn.Module):
    """``W·x + alpha/r·B·A·x``, A and B being trained; B begins as zero, A as PEFT's does."""

    def __init__(self, base: nn.Linear, rank: int, alpha: float, generator: torch.Generator):
        super().__init__()
        self.base, self.scale = base, alpha / rank
        bound = 1 / math.sqrt(base.in_features)  # kaiming_uniform_ with a = √5
        a = (2 * torch.rand(rank, base.in_features, generator=generator) - 1) * bound
        self.a = nn.Parameter(a.to(base.weight.device))
        self.b = nn.Parameter(torch.zeros(base.out_features, rank, device=base.weight.device))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[..., inputs] -> [..., outputs]"""
        added = F.linear(F.linear(x, self.a.to(x.dtype)), self.b.to(x.dtype))
        return self.base(x) + self.scale * added


def shape_for(
    model: PreTrainedModel, r_c2d: int, r_d2c: int, targets: tuple[str, ...], layers: Sequence[int] | None = None
) -> AdapterShape:
    """The shape of an adapter for a model of transformers; ``layers``: those to adapt, None for all of them.

    Raises ModelError for a model whose layers lack a target, or lack a layer, and for ranks that make no sense.
    """
    n_layers, widths = len(model.model.layers), {}
    for name in targets:
        linear = _linear(model, (0, name))
        widths |= {TARGETS[name].inputs: linear.in_features, TARGETS[name].outputs: linear.out_features}
    layers = tuple(range(n_layers)) if layers is None else tuple(layers)
    try:
        return AdapterShape(n_layers, widths, r_c2d, r_d2c, targets, layers)
    except ValueError as error:
        raise ModelError(str(error)) from None


def add_private_lora(model: PreTrainedModel, cloud: CloudAdapter) -> dict[Place, PrivateLoraLinear]:
    """Put PrivateLoRA with the A and B given in the place of the matrices that it adapts; returns what it put there."""
    modules = {}
    for layer, target in cloud.shape.places():
        base = _linear(model, (layer, target))
        modules[layer, target] = PrivateLoraLinear(base, cloud.a(layer, target), cloud.b(layer, target))
    return _put(model, modules)


def add_lora(model: PreTrainedModel, shape: AdapterShape, alpha: float, seed: int) -> dict[Place, LoraLinear]:
    """As ``add_private_lora``, of an ordinary LoRA of rank ``shape.r_c2d``, its A drawn from ``seed``."""
    generator = torch.Generator().manual_seed(seed % (1 << 63))
    modules = {place: LoraLinear(_linear(model, place), shape.r_c2d, alpha, generator) for place in shape.places()}
    return _put(model, modules)


def edge_adapter(modules: dict[Place, PrivateLoraLinear], cloud: CloudAdapter, dtype: type) -> EdgeAdapter:
    """What was trained, as the edge's half of an adapter; ``dtype``: numpy's float16 or float32."""
    matrices = {place: _array(module.m).astype(dtype) for place, module in modules.items()}
    return EdgeAdapter(cloud.shape, matrices, cloud.fingerprint, cloud.seed)


def lora_adapter(modules: dict[Place, LoraLinear], alpha: float) -> LoraAdapter:
    """What was trained, as a LoRA adapter."""
    return LoraAdapter({place: (_array(module.a), _array(module.b)) for place, module in modules.items()}, alpha)


def _linear(model: PreTrainedModel, place: Place) -> nn.Linear:
    layer, target = place
    path = TARGETS[target].module
    try:
        module = model.model.layers[layer].get_submodule(path)
    except (AttributeError, IndexError):
        module = None
    if not isinstance(module, nn.Linear) or module.bias is not None:
        kind = model.config.model_type
        raise ModelError(f"layer {layer} of this {kind} model has no {path} without bias: llama, mistral, qwen3 have")
    return module


def _put(model: PreTrainedModel, modules: dict[Place, nn.Module]) -> dict[Place, nn.Module]:
    for (layer, target), module in modules.items():
        parent, name = TARGETS[target].module.split(".")
        setattr(model.model.layers[layer].get_submodule(parent), name, module)
    return modules


def _array(parameter: nn.Parameter) -> np.ndarray:
    return parameter.detach().float().cpu().numpy()
