"""Bytes on disk and arrays in memory: model files, tokenizer files, quantised blocks. Needs numpy only."""

from dllama.formats.blocks import FloatType, dequantize, quantize
from dllama.formats.config import Activation, Arch, ModelConfig, RopeType
from dllama.formats.layout import TensorInfo, expert_name, tensor_kinds, tensor_layout, weights_bytes
from dllama.formats.model import ModelFile, ModelWriter

__all__ = [
    "Activation",
    "Arch",
    "FloatType",
    "ModelConfig",
    "ModelFile",
    "ModelWriter",
    "RopeType",
    "TensorInfo",
    "dequantize",
    "expert_name",
    "quantize",
    "tensor_kinds",
    "tensor_layout",
    "weights_bytes",
]
