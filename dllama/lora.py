"""Ordinary LoRA adapters in the form that PEFT writes: `adapter_config.json` and `adapter_model.safetensors`.

To the product with a matrix W the adapter adds ``scale·B·A·x`` (Hu et al., 2021, https://arxiv.org/abs/2106.09685);
the scale is alpha / r, or alpha / √r with ``use_rslora``. Rows of B for q and k are in the order of Hugging Face's
matrices; ``LoraAdapter.b_in_model`` gives them in that of the model file.
"""

import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from dllama.errors import AdapterError, FileError, FormatError
from dllama.formats import ModelConfig
from dllama.formats.files import AtomicFile, reason
from dllama.formats.json_file import read_json
from dllama.formats.rotary import to_model_order
from dllama.formats.safetensors import read_safetensors, write_safetensors
from dllama.formats.tensor import Tensor
from dllama.privatelora.shape import Place
from dllama.targets import DENSE, TARGETS

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model.model.layers."
NAME = re.compile(rf"{re.escape(PREFIX)}(0|[1-9][0-9]{{0,4}})\.([a-z_.]+)\.lora_([AB])\.weight")
BY_MODULE = {target.module: name for name, target in TARGETS.items()}

REFUSED = {
    "use_dora": "DoRA also scales the base model's own rows",
    "modules_to_save": "it replaces whole matrices of the base model",
    "alpha_pattern": "a scale of their own for some matrices is not supported",
    "fan_in_fan_out": "its base model's matrices are transposed",
    "layer_replication": "its base model has layers twice",
    "lora_bias": "a .m file has no place for biases",
    "trainable_token_indices": "it changes the embedding",
    "target_parameters": "it changes parameters that are no matrices of a layer",
    "use_qalora": "QALoRA pools its inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "kasa_config": "KaSA has a third matrix",
    "monteclora_config": "its weights are drawn anew at each pass",
    "arrow_config": "it mixes several adapters",
    "alora_invocation_tokens": "it adds to a part of the text only",
}
"""Settings that say more than ``scale·B·A``, and what they would ask for."""

HARMLESS_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Ways to begin training that leave the base model's weights as they are."""


@dataclass(frozen=True)
class LoraAdapter:
    """A and B of each place, and alpha.

    matrices: (layer, target) -> (A [r, inputs], B [outputs, r]), float32
    rank_stabilised: the scale is alpha / √r
    name: what messages call it, the adapter's folder
    """

    matrices: Mapping[Place, tuple[np.ndarray, np.ndarray]]
    alpha: float
    rank_stabilised: bool = False
    name: str = "the adapter"

    @property
    def nbytes(self) -> int:
        """Bytes of all matrices."""
        return sum(a.nbytes + b.nbytes for a, b in self.matrices.values())

    def a(self, layer: int, target: str) -> np.ndarray:
        """float32 [r, inputs of the target]"""
        return self.matrices[layer, target][0]

    def b(self, layer: int, target: str) -> np.ndarray:
        """float32 [outputs of the target, r], rows in the order of Hugging Face's matrices"""
        return self.matrices[layer, target][1]

    def b_in_model(self, layer: int, target: str, config: ModelConfig) -> np.ndarray:
        """As ``b``, rows in the order of the model file that ``config`` is of."""
        return to_model_order(self.b(layer, target), TARGETS[target].matrix, config)

    def scale(self, layer: int, target: str) -> float:
        """What B·A·x is multiplied with."""
        rank = len(self.a(layer, target))
        return self.alpha / (math.sqrt(rank) if self.rank_stabilised else rank)

    def check(self, config: ModelConfig) -> None:
        """AdapterError where the model is not the one that the adapter is for."""
        for (layer, target), (a, b) in self.matrices.items():
            if layer >= config.n_layers:
                raise AdapterError(f"{self.name}: adds to layer {layer}, and the model has {config.n_layers}")
            if config.arch.has_experts and target in DENSE:
                raise AdapterError(f"{self.name}: it adapts {target}, and this model is a mixture of experts")
            widths = a.shape[1], b.shape[0]
            expected = getattr(config, TARGETS[target].inputs), getattr(config, TARGETS[target].outputs)
            if widths != expected:
                raise AdapterError(
                    f"{self.name}: for a model whose {target} takes {widths[0]} values and gives {widths[1]}, "
                    f"and it is {expected[0]} and {expected[1]} here"
                )


def read_lora(folder: str | os.PathLike) -> LoraAdapter:
    """The adapter in a folder. FileError (FormatError) for files that cannot be read, AdapterError for an adapter that
    is not supported, with the reason."""
    folder = Path(folder)
    settings = read_json(folder / CONFIG_FILE)
    try:
        alpha, rank = _check_settings(settings)
    except ValueError as error:
        raise AdapterError(f"{folder / CONFIG_FILE}: {error}") from None
    path = folder / WEIGHTS_FILE
    if not path.exists() and path.with_suffix(".bin").exists():
        raise FormatError(path.with_suffix(".bin"), "a torch file: save the adapter with safe_serialization=True")
    pairs = dict(_pairs(path, read_safetensors(path)))
    if not settings.get("rank_pattern"):
        for (layer, target), (a, _) in pairs.items():
            if a.shape[0] != rank:
                raise AdapterError(
                    f"{path}: {target} of layer {layer} has rank {a.shape[0]}, {CONFIG_FILE} says {rank}"
                )
    matrices = {place: (a.values(), b.values()) for place, (a, b) in pairs.items()}
    return LoraAdapter(matrices, alpha, bool(settings.get("use_rslora")), str(folder))


def write_lora(folder: str | os.PathLike, adapter: LoraAdapter, base: str) -> None:
    """Write an adapter whose places all have one rank; ``base``: name or path of the base model. Raises FileError."""
    (rank,) = {len(a) for a, _ in adapter.matrices.values()}
    settings = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "lora_alpha": adapter.alpha,
        "lora_dropout": 0.0,
        "peft_type": "LORA",
        "r": rank,
        "target_modules": sorted({TARGETS[target].module.split(".")[1] for _, target in adapter.matrices}),
        "task_type": "CAUSAL_LM",
        "use_rslora": adapter.rank_stabilised,
    }
    layers = sorted({layer for layer, _ in adapter.matrices})
    tensors = {}
    for (layer, target), (a, b) in adapter.matrices.items():
        module = f"{PREFIX}{layer}.{TARGETS[target].module}"
        tensors[f"{module}.lora_A.weight"], tensors[f"{module}.lora_B.weight"] = a, b
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise FileError(folder, f"cannot be made: {reason(error)}") from None
    text = json.dumps(settings | {"layers_to_transform": layers}, indent=2).encode() + b"\n"
    with AtomicFile(Path(folder, CONFIG_FILE), len(text)) as file:
        file.write(text)
    write_safetensors(Path(folder, WEIGHTS_FILE), tensors, {"format": "pt"})


def _check_settings(settings: dict) -> tuple[float, int]:
    """Alpha and the rank; ValueError where the adapter is more than ``scale·B·A``, or is none."""
    if settings.get("peft_type") != "LORA":
        raise ValueError(f"peft_type is {settings.get('peft_type')!r}: only LORA is supported")
    for name, meaning in REFUSED.items():
        if settings.get(name):
            raise ValueError(f"{name} is set: {meaning}, which is not supported")
    if settings.get("bias", "none") != "none":
        raise ValueError(f"bias is {settings['bias']!r}: a .m file has no place for biases")
    start = settings.get("init_lora_weights")
    if start not in HARMLESS_STARTS:
        raise ValueError(f"init_lora_weights is {start!r}, which changes the base model (PEFT's save can convert it)")
    alpha, rank = settings.get("lora_alpha"), settings.get("r")
    if type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise ValueError(f"lora_alpha is {alpha!r}, not a number")
    if type(rank) is not int or rank < 1:
        raise ValueError(f"r is {rank!r}, not a whole number above 0")
    return float(alpha), rank


def _pairs(path: Path, tensors: Mapping[str, Tensor]) -> Iterator[tuple[Place, tuple[Tensor, Tensor]]]:
    """A and B of each place, of shapes that fit each other."""
    found: dict[Place, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        match = NAME.fullmatch(name)
        if not match or match[2] not in BY_MODULE:
            raise AdapterError(f"{path}: tensor {name} is not A or B of a known matrix ({', '.join(BY_MODULE)})")
        found.setdefault((int(match[1]), BY_MODULE[match[2]]), {})[match[3]] = tensor
    if not found:
        raise AdapterError(f"{path}: holds no matrices")
    for place, pair in sorted(found.items()):
        if len(pair) != 2:
            raise AdapterError(f"{path}: tensor {next(iter(pair.values())).name} lacks its counterpart")
        a, b = pair["A"], pair["B"]
        if len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1] or not a.shape[0]:
            raise AdapterError(f"{path}: {a.name} is {list(a.shape)} and {b.name} {list(b.shape)}: no rank in common")
        yield place, (a, b)
