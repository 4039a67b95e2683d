"""Hugging Face's `config.json` -> ModelConfig: what can be converted, and the reason for what cannot."""

import os
from pathlib import Path

from converter.safetensors import read_json
from dllama.errors import FormatError
from dllama.formats import Arch, FloatType, ModelConfig, RopeType

ARCHITECTURES = {
    "LlamaForCausalLM": Arch.LLAMA,
    "MistralForCausalLM": Arch.LLAMA,
    "Qwen3ForCausalLM": Arch.QWEN3,
}
MISTRAL_WINDOW = 4096  # what transformers takes for a Mistral whose config.json has no sliding_window


def read_config(
    folder: str | os.PathLike, weight_type: FloatType, seq_len: int | None = None
) -> tuple[ModelConfig, bool]:
    """The model in a checkpoint folder, and whether its output matrix is the embedding.

    seq_len: a shorter context than the model's own, or None
    Raises FileError where config.json cannot be read, FormatError for a model that a `.m` file cannot hold.
    """
    path = Path(folder) / "config.json"
    try:
        return parse_config(read_json(path), weight_type, seq_len)
    except ValueError as error:
        raise FormatError(path, str(error)) from None


def parse_config(values: dict, weight_type: FloatType, seq_len: int | None = None) -> tuple[ModelConfig, bool]:
    """As ``read_config``, from the object in config.json. ValueError with the reason."""
    names = values.get("architectures")
    name = names[0] if isinstance(names, list) and len(names) == 1 else names
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"architecture {name} cannot be converted (known: {', '.join(ARCHITECTURES)})")
    arch = ARCHITECTURES[name]
    _refuse_extras(values)

    dim, n_heads = _integer(values, "hidden_size"), _integer(values, "num_attention_heads")
    head_dim = _integer(values, "head_dim", 0)
    if not head_dim:
        if n_heads < 1 or dim % n_heads:
            raise ValueError(f"hidden_size {dim} cannot be split over {n_heads} heads")
        head_dim = dim // n_heads
    rope_type, rope_values = _rope(values, arch)
    config = ModelConfig(
        arch=arch,
        dim=dim,
        hidden_dim=_integer(values, "intermediate_size"),
        n_layers=_integer(values, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=_integer(values, "num_key_value_heads", n_heads),
        head_dim=head_dim,
        vocab_size=_integer(values, "vocab_size"),
        seq_len=_context(values, name, seq_len),
        norm_epsilon=_epsilon(values),
        rope_type=rope_type,
        **rope_values,
        weight_type=weight_type,
    )
    return config, bool(values.get("tie_word_embeddings", False))


def _refuse_extras(values: dict) -> None:
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            raise ValueError(f"{key} is true, and a .m file has no place for biases")
    if values.get("quantization_config"):
        raise ValueError("the checkpoint is quantised already (quantization_config): convert the original")
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {values['hidden_act']} is not supported (known: silu)")
    if values.get("partial_rotary_factor", 1) != 1:
        raise ValueError("partial_rotary_factor: rotary embedding of a part of the head is not supported")


def _context(values: dict, architecture: str, seq_len: int | None) -> int:
    """The context length: the model's own or the shorter one asked for, within the attention's window.

    Attention that looks back ``window`` tokens equals full attention for as long as the context is no longer, so such
    a model converts exactly up to there and is refused beyond.
    """
    longest = _integer(values, "max_position_embeddings")
    if seq_len is not None and seq_len > longest:
        raise ValueError(f"a context of {seq_len} is longer than the model's own, {longest}")
    seq_len = seq_len or longest
    if architecture == "MistralForCausalLM":
        window = values["sliding_window"] if "sliding_window" in values else MISTRAL_WINDOW
    else:
        window = values.get("sliding_window") if values.get("use_sliding_window") else None
    if window is not None and _whole(window, "sliding_window") < seq_len:
        raise ValueError(
            f"attention looks back {window} tokens only (sliding_window), which a .m file cannot say: "
            f"a context of up to {window} converts exactly (--seq-len {window})"
        )
    return seq_len


def _epsilon(values: dict) -> float:
    epsilon = _number(values.get("rms_norm_eps", 1e-6), "rms_norm_eps")
    for known in (1e-5, 1e-6):
        if abs(epsilon - known) < 1e-3 * known:  # as float32 it may be 9.999999747378752e-06
            return known
    raise ValueError(f"rms_norm_eps is {epsilon}, and a .m file holds 1e-05 and 1e-06 only")


def _rope(values: dict, arch: Arch) -> tuple[RopeType, dict]:
    """Rope type, and theta and scaling as ModelConfig names them.

    transformers 5 writes all of it into ``rope_parameters``, earlier ones ``rope_theta`` and ``rope_scaling``.
    """
    parameters = values.get("rope_parameters") or values.get("rope_scaling") or {}
    if not isinstance(parameters, dict) or any(isinstance(value, dict) for value in parameters.values()):
        raise ValueError("rope parameters that differ between layers are not supported")
    if parameters.get("partial_rotary_factor", 1) != 1:
        raise ValueError("partial_rotary_factor: rotary embedding of a part of the head is not supported")
    theta = parameters.get("rope_theta", values.get("rope_theta", 10000.0))
    result = {"rope_theta": _number(theta, "rope_theta")}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return (RopeType.HALF_SPLIT if arch is Arch.QWEN3 else RopeType.LLAMA), result
    if kind != "llama3" or arch is Arch.QWEN3:
        raise ValueError(f"rope scaling {kind} is not supported (known: llama3, for llama models)")
    result["rope_scaling_factor"] = _number(parameters.get("factor"), "rope scaling factor")
    result["rope_scaling_low_freq_factor"] = _number(parameters.get("low_freq_factor"), "low_freq_factor")
    result["rope_scaling_high_freq_factor"] = _number(parameters.get("high_freq_factor"), "high_freq_factor")
    result["rope_scaling_orig_seq_len"] = _integer(parameters, "original_max_position_embeddings")
    return RopeType.LLAMA3_1, result


def _integer(values: dict, key: str, default: int | None = None) -> int:
    value = values.get(key)
    if value is None:
        if default is None:
            raise ValueError(f"{key} is missing")
        return default
    return _whole(value, key)


def _whole(value, what: str) -> int:
    if type(value) is not int:
        raise ValueError(f"{what} is {value!r}, not a whole number")
    return value


def _number(value, what: str) -> float:
    if type(value) not in (int, float):
        raise ValueError(f"{what} is {value!r}, not a number" if value is not None else f"{what} is missing")
    try:
        return float(value)
    except OverflowError:
        raise ValueError(f"{what} is too large a number") from None
