"""The model in a GGUF file -> a Checkpoint.

llama.cpp's llama files hold q and k in Meta's order of rows, as a `.m` file does, and its qwen3 files in the half-split
order, as a `.m` file does: nothing is reordered. The matrices of all experts of a layer are one tensor of three
dimensions, expert after expert.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from converter.checkpoint import Checkpoint
from converter.gguf_file import TYPES, read_gguf
from converter.hf_config import linear_scaling
from converter.values import epsilon, number, text
from dllama.errors import FormatError
from dllama.formats import Arch, FloatType, ModelConfig, RopeType, TensorInfo, dequantize, tensor_layout
from dllama.formats.tensor import READABLE, Read, Tensor, read_bytes

ARCHITECTURES = {"llama": Arch.LLAMA, "qwen3": Arch.QWEN3, "qwen3moe": Arch.QWEN3_MOE}

WHOLE_MODEL = {"embedding": "token_embd.weight", "final_norm": "output_norm.weight", "output": "output.weight"}
IN_LAYER = {
    "q": "attn_q", "k": "attn_k", "v": "attn_v", "o": "attn_output",
    "w1": "ffn_gate", "w2": "ffn_down", "w3": "ffn_up",
    "q_norm": "attn_q_norm", "k_norm": "attn_k_norm", "attention_norm": "attn_norm", "ffn_norm": "ffn_norm",
    "router": "ffn_gate_inp",
}  # fmt: skip
EXPERTS = "_exps"  # after the name of a tensor of all experts' matrices
ROPE_FACTORS = "rope_freqs.weight"
EPSILON = "{}.attention.layer_norm_rms_epsilon"

SAME = {"F32": FloatType.F32, "F16": FloatType.F16, "Q4_0": FloatType.Q40, "Q8_0": FloatType.Q80}
"""Types whose bytes are those of a `.m` file."""

BLOCKS = {name: (block, block_bytes) for name, block, block_bytes in TYPES.values()}

STEP = 1 << 16  # values that the package is given at a time: it makes many copies of them

LLAMA3_FACTORS = (1.0, 4.0)  # low and high frequency factor of every Llama 3.1 to 3.3
LLAMA3_CONTEXT = 8192


@dataclass(frozen=True)
class GgufTensor(Tensor):
    """A tensor of a GGUF file, read a few rows at a time. dtype: a name in TYPES"""

    @property
    def row_bytes(self) -> int:
        block, block_bytes = BLOCKS[self.dtype]
        return self.shape[-1] // block * block_bytes

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape[:-1]) * self.row_bytes

    def rows(self, start: int, stop: int, read: Read = read_bytes) -> np.ndarray:
        """Rows ``start`` to ``stop`` as float32 [stop - start, columns]."""
        if self.dtype in READABLE:
            return super().rows(start, stop, read)
        raw = self.raw(start, stop, read)
        if self.dtype in SAME:
            return dequantize(raw, SAME[self.dtype], self.shape[-1])
        return _dequantize_by_package(raw, self.dtype)

    def stored(self, start: int, stop: int, float_type: FloatType, read: Read = read_bytes) -> np.ndarray | None:
        """Rows ``start`` to ``stop`` as they are stored, uint8 [stop - start, row_bytes]; None where ``float_type``
        has other bytes. ValueError for values that are not finite."""
        if SAME.get(self.dtype) is not float_type:
            return None
        raw = self.raw(start, stop, read)
        if float_type.is_quantized:
            _, block_bytes = BLOCKS[self.dtype]
            numbers = np.ascontiguousarray(raw.reshape(-1, block_bytes)[:, :2]).view("<f2")  # the scales
        else:
            numbers = raw.view("<f4" if float_type is FloatType.F32 else "<f2")
        if not np.isfinite(numbers).all():
            raise ValueError("values that are not finite (NaN or infinity)")
        return raw


def open_file(path: Path, weight_type: FloatType, seq_len: int | None = None) -> Checkpoint:
    """The model in a GGUF file; seq_len: a shorter context than the model's own, or None.

    Raises FileError (FormatError) naming the file and the reason.
    """
    path = Path(path)
    metadata, entries = read_gguf(path)
    tensors = {e.name: GgufTensor(e.name, path, TYPES[e.kind][0], e.shape, e.offset) for e in entries.values()}
    try:
        config = _config(metadata, tensors, weight_type, seq_len)
        sources = list(_match(config, tensors))
        for name in {tensor.dtype for _, tensor in sources} - set(SAME) - set(READABLE):
            _package(name)
    except ValueError as error:
        raise FormatError(path, str(error)) from None
    return Checkpoint("GGUF file", path, config, sources, [path])


def tensor_name(info: TensorInfo) -> str:
    """llama.cpp's name of a tensor of the model file, or of the one that it is an expert's part of."""
    if info.layer is None:
        return WHOLE_MODEL[info.name]
    return f"blk.{info.layer}.{IN_LAYER[info.kind]}{'' if info.expert is None else EXPERTS}.weight"


def tensor_shape(info: TensorInfo, config: ModelConfig) -> tuple[int, ...]:
    """The shape of llama.cpp's tensor of this name."""
    return info.shape if info.expert is None else (config.n_experts, *info.shape)


def _match(config: ModelConfig, tensors: dict[str, GgufTensor]) -> Iterator[tuple[TensorInfo, GgufTensor]]:
    """The tensors in the model file's order; without an output matrix, it is the embedding."""
    used = {ROPE_FACTORS}
    for info in tensor_layout(config):
        name = tensor_name(info)
        if info.name == "output" and name not in tensors:
            name = WHOLE_MODEL["embedding"]
        if name not in tensors:
            raise ValueError(f"tensor {name} is missing")
        tensor, shape = tensors[name], tensor_shape(info, config)
        if tensor.shape != shape:
            raise ValueError(f"tensor {name} is {list(tensor.shape)}, the metadata call for {list(shape)}")
        used.add(name)
        yield info, tensor if info.expert is None else _of_expert(tensor, info.expert)
    for name in tensors:
        if name not in used:
            bias = ", and a .m file has no place for biases" if name.endswith(".bias") else ""
            raise ValueError(f"tensor {name} has no place in this architecture{bias}")


def _of_expert(tensor: GgufTensor, expert: int) -> GgufTensor:
    """One expert's matrix in a tensor [experts, rows, columns]."""
    rows = tensor.shape[1]
    return replace(tensor, shape=tensor.shape[1:], offset=tensor.offset + expert * rows * tensor.row_bytes)


def _config(metadata: dict, tensors: dict, weight_type: FloatType, seq_len: int | None) -> ModelConfig:
    name = text(metadata, "general.architecture")
    if name not in ARCHITECTURES:
        raise ValueError(f"architecture {name} cannot be converted (known: {', '.join(ARCHITECTURES)})")
    arch = ARCHITECTURES[name]
    count = metadata.get("split.count", 0)
    if type(count) is not int or count > 1:
        raise ValueError("one of several parts: join them first (llama-gguf-split --merge)")

    def integer(key: str, default: int | None = None) -> int:
        value = metadata.get(f"{name}.{key}", default)
        if isinstance(value, np.ndarray) and len(value) and (value == value[0]).all():
            value = value[0].item()  # one value a layer
        if type(value) is not int:
            raise ValueError(f"{name}.{key} is missing" if value is None else f"{name}.{key} is not one whole number")
        return value

    experts = {}
    if arch.has_experts:
        experts = {"n_experts": integer("expert_count"), "n_active_experts": integer("expert_used_count")}
        experts["moe_hidden_dim"] = integer("expert_feed_forward_length")
    elif integer("expert_count", 0):
        raise ValueError(f"mixture of experts in architecture {name} cannot be converted")
    dim, n_heads, longest = integer("embedding_length"), integer("attention.head_count"), integer("context_length")
    if n_heads < 1:
        raise ValueError(f"{name}.attention.head_count is {n_heads}")
    head_dim = integer("attention.key_length", dim // n_heads)
    if integer("attention.value_length", head_dim) != head_dim or integer("rope.dimension_count", head_dim) != head_dim:
        raise ValueError("heads whose values or rotated parts are of another size than their keys are not supported")
    if seq_len is not None and seq_len > longest:
        raise ValueError(f"a context of {seq_len} is longer than the model's own, {longest}")
    embedding = tensors.get(WHOLE_MODEL["embedding"])
    if embedding is None:
        raise ValueError(f"tensor {WHOLE_MODEL['embedding']} is missing")
    rope_type, scaling = _rope(metadata, name, arch, tensors, head_dim)
    return ModelConfig(
        arch=arch,
        dim=dim,
        hidden_dim=integer("feed_forward_length", experts.get("moe_hidden_dim")),
        n_layers=integer("block_count"),
        n_heads=n_heads,
        n_kv_heads=integer("attention.head_count_kv", n_heads),
        head_dim=head_dim,
        vocab_size=embedding.shape[0],
        seq_len=seq_len or longest,
        norm_epsilon=epsilon(metadata.get(EPSILON.format(name)), EPSILON.format(name)),
        rope_theta=_theta(metadata, name),
        rope_type=rope_type,
        **scaling,
        **experts,
        weight_type=weight_type,
    )


def _theta(metadata: dict, name: str) -> float:
    key = f"{name}.rope.freq_base"
    theta = number(metadata.get(key, 10000.0), key)
    if not 1 <= theta < 1 << 31:  # nothing can be computed with it either
        raise ValueError(f"{key} is {theta}, not between 1 and {(1 << 31) - 1}")
    return theta


def _rope(metadata: dict, name: str, arch: Arch, tensors: dict, head_dim: int) -> tuple[RopeType, dict]:
    """Rope type, and scaling as ModelConfig names it.

    As llama.cpp has it, a factor without a type is linear scaling's, and 0 stands for 1.
    """
    kind, factors = text(metadata, f"{name}.rope.scaling.type") or "linear", tensors.get(ROPE_FACTORS)
    if kind == "linear":
        factor = _linear_factor(metadata, name)
        if factor == 1:
            kind = "none"
        elif factors is None and arch is Arch.LLAMA:
            return RopeType.LLAMA3_1, linear_scaling(factor)
    if kind != "none" or (arch.is_qwen3 and factors is not None):
        raise ValueError(f"rope scaling {kind} is not supported (known: linear and Llama 3.1's, for llama models)")
    if arch.is_qwen3:
        return RopeType.HALF_SPLIT, {}
    if factors is None:
        return RopeType.LLAMA, {}
    if factors.shape != (head_dim // 2,):
        raise ValueError(f"tensor {ROPE_FACTORS} is {list(factors.shape)}, not {[head_dim // 2]}")
    return _llama3_scaling(factors.rows(0, 1)[0], _theta(metadata, name))


def _linear_factor(metadata: dict, name: str) -> float:
    """What linear scaling divides the rotary frequencies by, under its present key or the older one."""
    for key in (f"{name}.rope.scaling.factor", f"{name}.rope.scale_linear"):
        if key in metadata:
            return number(metadata[key], key) or 1.0
    return 1.0


def rope_factors(theta: float, head_dim: int, factor: float, low: float, high: float, original: int) -> np.ndarray:
    """What Llama 3.1 divides the rotary frequencies by: float64 [head_dim / 2].

    Wavelengths below original/high stay, those above original/low grow by ``factor``, those between by a mean that
    moves with the frequency (apply_scaling in Meta's llama-models).
    """
    wavelengths = 2 * np.pi * theta ** (np.arange(0, head_dim, 2) / head_dim)
    smooth = np.clip((original / wavelengths - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / factor + smooth)


def _llama3_scaling(factors: np.ndarray, theta: float) -> tuple[RopeType, dict]:
    """The scaling that gave these factors: a GGUF holds what was computed, a `.m` file what it was computed from."""
    factors = factors.astype(np.float64)
    if not np.isfinite(factors).all() or (factors < 1).any():
        raise ValueError(f"tensor {ROPE_FACTORS} holds factors that are not Llama 3.1's")
    factor = float(factors.max())
    if factor == 1:
        return RopeType.LLAMA, {}
    if factors.min() == factor:
        return RopeType.LLAMA3_1, linear_scaling(factor)
    low, high = LLAMA3_FACTORS
    wavelengths = 2 * np.pi * theta ** (np.arange(len(factors)) / len(factors))
    original = LLAMA3_CONTEXT
    between = np.flatnonzero((factors > 1) & (factors < factor))
    if len(between):
        i = between[0]
        smooth = (1 / factors[i] - 1 / factor) / (1 - 1 / factor)
        original = round((smooth * (high - low) + low) * wavelengths[i])
    again = rope_factors(theta, 2 * len(factors), factor, low, high, original)
    if not np.allclose(again, factors, rtol=1e-4) or factor != round(factor):
        raise ValueError(f"tensor {ROPE_FACTORS} holds factors that are not Llama 3.1's")
    return RopeType.LLAMA3_1, {
        "rope_scaling_factor": factor,
        "rope_scaling_low_freq_factor": low,
        "rope_scaling_high_freq_factor": high,
        "rope_scaling_orig_seq_len": original,
    }


def _package(dtype: str):
    """The gguf package, which knows every block; ValueError where it is not installed, or too old for this one."""
    try:
        import gguf
    except ImportError:
        raise ValueError(f"{dtype} weights need the gguf package: pip install 'dllama[convert]'") from None
    if dtype not in gguf.GGMLQuantizationType.__members__:
        raise ValueError(f"{dtype} weights need a newer gguf package: pip install --upgrade gguf")
    return gguf


def _dequantize_by_package(raw: np.ndarray, dtype: str) -> np.ndarray:
    """raw: uint8 [rows, row_bytes] -> float32 [rows, columns]"""
    gguf = _package(dtype)
    kind = gguf.GGMLQuantizationType[dtype]
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    out = np.empty((len(raw), raw.shape[1] // block_bytes * block), np.float32)
    step = max(1, STEP // out.shape[1])
    for start in range(0, len(raw), step):
        with np.errstate(over="ignore", invalid="ignore"):  # the values are checked, whatever the scales are
            out[start : start + step] = gguf.quants.dequantize(raw[start : start + step], kind)
    return out
