"""Hugging Face's `config.json` -> ModelConfig: what can be converted, and the reason for what cannot."""

import os
from pathlib import Path

from converter.values import epsilon, number, whole, whole_number
from dllama.errors import FormatError
from dllama.formats import Arch, FloatType, ModelConfig, RopeType
from dllama.formats.json_file import read_json
from dllama.formats.tensor import READABLE

ARCHITECTURES = {
    "LlamaForCausalLM": Arch.LLAMA,
    "MistralForCausalLM": Arch.LLAMA,
    "Qwen3ForCausalLM": Arch.QWEN3,
    "Qwen3MoeForCausalLM": Arch.QWEN3_MOE,
}
BIASED = ("Qwen2ForCausalLM",)  # q, k and v add one, whatever config.json says
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
    known = ", ".join(ARCHITECTURES)
    if name in BIASED:
        raise ValueError(
            f"architecture {name} cannot be converted: a .m file has no place for attention biases (known: {known})"
        )
    if not isinstance(name, str) or name not in ARCHITECTURES:
        raise ValueError(f"architecture {name} cannot be converted (known: {known})")
    arch = ARCHITECTURES[name]
    _refuse_extras(values)

    dim, n_heads = whole(values, "hidden_size"), whole(values, "num_attention_heads")
    head_dim = whole(values, "head_dim", 0)
    if not head_dim:
        if n_heads < 1 or dim % n_heads:
            raise ValueError(f"hidden_size {dim} cannot be split over {n_heads} heads")
        head_dim = dim // n_heads
    rope_type, rope_values = _rope(values, arch)
    config = ModelConfig(
        arch=arch,
        dim=dim,
        hidden_dim=whole(values, "intermediate_size"),
        n_layers=whole(values, "num_hidden_layers"),
        n_heads=n_heads,
        n_kv_heads=whole(values, "num_key_value_heads", n_heads),
        head_dim=head_dim,
        vocab_size=whole(values, "vocab_size"),
        seq_len=_context(values, name, seq_len),
        norm_epsilon=epsilon(values.get("rms_norm_eps", 1e-6), "rms_norm_eps"),
        rope_type=rope_type,
        **rope_values,
        **(_experts(values) if arch.has_experts else {}),
        weight_type=weight_type,
    )
    return config, bool(values.get("tie_word_embeddings", False))


def _refuse_extras(values: dict) -> None:
    for key in ("attention_bias", "mlp_bias"):
        if values.get(key):
            raise ValueError(f"{key} is true, and a .m file has no place for biases")
    quantised = values.get("quantization_config")
    if quantised:
        method = quantised.get("quant_method") if isinstance(quantised, dict) else None
        raise ValueError(
            f"the checkpoint is quantised already, by {method or 'a method that quantization_config does not name'}: "
            f"convert the original (known: {', '.join(READABLE)})"
        )
    if values.get("hidden_act", "silu") != "silu":
        raise ValueError(f"hidden_act {values['hidden_act']} is not supported (known: silu)")
    if values.get("partial_rotary_factor", 1) != 1:
        raise ValueError("partial_rotary_factor: rotary embedding of a part of the head is not supported")


def _experts(values: dict) -> dict:
    """The mixture of experts as ModelConfig names it. ValueError for what a `.m` file cannot say."""
    if values.get("norm_topk_prob") is not True:
        raise ValueError("norm_topk_prob is not true: the weights of a .m file's experts always sum to 1")
    if values.get("decoder_sparse_step", 1) != 1 or values.get("mlp_only_layers"):
        raise ValueError("layers without experts (decoder_sparse_step, mlp_only_layers) are not supported")
    if values.get("n_shared_experts") or values.get("shared_expert_intermediate_size"):
        raise ValueError("experts that all tokens share are not supported")
    count = "num_local_experts" if "num_local_experts" in values else "num_experts"  # since transformers 5; before
    return {
        "n_experts": whole(values, count),
        "n_active_experts": whole(values, "num_experts_per_tok"),
        "moe_hidden_dim": whole(values, "moe_intermediate_size"),
    }


def _context(values: dict, architecture: str, seq_len: int | None) -> int:
    """The context length: the model's own or the shorter one asked for, within the attention's window.

    Attention that looks back ``window`` tokens equals full attention for as long as the context is no longer, so such
    a model converts exactly up to there and is refused beyond.
    """
    longest = whole(values, "max_position_embeddings")
    if seq_len is not None and seq_len > longest:
        raise ValueError(f"a context of {seq_len} is longer than the model's own, {longest}")
    seq_len = seq_len or longest
    if architecture == "MistralForCausalLM":
        window = values["sliding_window"] if "sliding_window" in values else MISTRAL_WINDOW
    else:
        window = values.get("sliding_window") if values.get("use_sliding_window") else None
    if window is not None and whole_number(window, "sliding_window") < seq_len:
        raise ValueError(
            f"attention looks back {window} tokens only (sliding_window), which a .m file cannot say: "
            f"a context of up to {window} converts exactly (--seq-len {window})"
        )
    return seq_len


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
    result = {"rope_theta": number(theta, "rope_theta")}
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return (RopeType.HALF_SPLIT if arch.is_qwen3 else RopeType.LLAMA), result
    if arch.is_qwen3 or kind not in ("llama3", "linear"):
        raise ValueError(f"rope scaling {kind} is not supported (known: llama3 and linear, for llama models)")
    if kind == "linear":
        return RopeType.LLAMA3_1, result | linear_scaling(number(parameters.get("factor"), "rope scaling factor"))
    result["rope_scaling_factor"] = number(parameters.get("factor"), "rope scaling factor")
    result["rope_scaling_low_freq_factor"] = number(parameters.get("low_freq_factor"), "low_freq_factor")
    result["rope_scaling_high_freq_factor"] = number(parameters.get("high_freq_factor"), "high_freq_factor")
    result["rope_scaling_orig_seq_len"] = whole(parameters, "original_max_position_embeddings")
    return RopeType.LLAMA3_1, result


def linear_scaling(factor: float) -> dict:
    """Every frequency divided by a factor, in Llama 3.1's terms.

    These divide the frequencies whose wavelength is longer than original length / low factor = 1 token, and that is
    all of them: the shortest is 2 pi tokens.
    """
    if not 1 <= factor <= 1 << 20 or factor % 1:
        raise ValueError(f"linear rope scaling by {factor}, and a .m file holds whole numbers only")
    return {
        "rope_scaling_factor": factor,
        "rope_scaling_low_freq_factor": 1.0,
        "rope_scaling_high_freq_factor": 2.0,
        "rope_scaling_orig_seq_len": 1,
    }
