"""Small Hugging Face checkpoints of random weights, written with the format's description alone."""

import json
import struct
from pathlib import Path

import numpy as np

LLAMA = {
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 64, "intermediate_size": 96,
    "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 50, "hidden_act": "silu",
    "max_position_embeddings": 128, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "rope_scaling": None,
    "tie_word_embeddings": False, "attention_bias": False, "mlp_bias": False,
}  # fmt: skip
MISTRAL = {**LLAMA, "architectures": ["MistralForCausalLM"], "sliding_window": None, "rms_norm_eps": 1e-06}
QWEN3 = {
    **LLAMA, "architectures": ["Qwen3ForCausalLM"], "head_dim": 24, "rope_theta": 1000000, "rms_norm_eps": 1e-06,
    "use_sliding_window": False, "sliding_window": None, "tie_word_embeddings": True,
}  # fmt: skip
LLAMA3_1 = {
    **LLAMA,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip
CONFIGS = {"llama": LLAMA, "mistral": MISTRAL, "qwen3": QWEN3, "llama3.1": LLAMA3_1}


def safetensors_bytes(tensors: dict[str, tuple[str, tuple, bytes]], metadata: dict | None = None) -> bytes:
    """A safetensors file of ``name -> (dtype, shape, bytes)``."""
    header = {} if metadata is None else {"__metadata__": metadata}
    offset = 0
    for name, (dtype, shape, data) in tensors.items():
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, offset + len(data)]}
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + b"".join(data for _, _, data in tensors.values())


def encoded(values: np.ndarray, dtype: str) -> tuple[str, tuple, bytes]:
    """float32 values as a tensor of a safetensors file; bfloat16 by cutting the lower half off."""
    if dtype == "BF16":
        data = (np.ascontiguousarray(values).view(np.uint32) >> 16).astype("<u2").tobytes()
    else:
        data = values.astype({"F32": "<f4", "F16": "<f2"}[dtype]).tobytes()
    return dtype, values.shape, data


def shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """The tensors that transformers saves for ``config``."""
    dim, hidden, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    head_dim = config.get("head_dim") or dim // config["num_attention_heads"]
    q_dim, kv_dim = config["num_attention_heads"] * head_dim, config["num_key_value_heads"] * head_dim
    result = {"model.embed_tokens.weight": (vocab, dim), "model.norm.weight": (dim,)}
    if not config["tie_word_embeddings"]:
        result["lm_head.weight"] = (vocab, dim)
    for layer in range(config["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        result |= {
            prefix + "input_layernorm.weight": (dim,),
            prefix + "post_attention_layernorm.weight": (dim,),
            prefix + "mlp.gate_proj.weight": (hidden, dim),
            prefix + "mlp.up_proj.weight": (hidden, dim),
            prefix + "mlp.down_proj.weight": (dim, hidden),
            prefix + "self_attn.q_proj.weight": (q_dim, dim),
            prefix + "self_attn.k_proj.weight": (kv_dim, dim),
            prefix + "self_attn.v_proj.weight": (kv_dim, dim),
            prefix + "self_attn.o_proj.weight": (dim, q_dim),
        }
        if config["architectures"] == ["Qwen3ForCausalLM"]:
            result |= {
                prefix + "self_attn.q_norm.weight": (head_dim,),
                prefix + "self_attn.k_norm.weight": (head_dim,),
            }
    return result


def random_weights(config: dict, dtype: str = "F32", seed: int = 0) -> dict[str, np.ndarray]:
    """Every tensor as float32, of values that ``dtype`` holds exactly."""
    rng = np.random.default_rng(seed)
    weights = {name: rng.standard_normal(shape, dtype=np.float32) for name, shape in sorted(shapes(config).items())}
    if dtype == "BF16":
        return {name: (w.view(np.uint32) & 0xFFFF0000).view(np.float32) for name, w in weights.items()}
    if dtype == "F16":
        return {name: w.astype(np.float16).astype(np.float32) for name, w in weights.items()}
    return weights


def write(folder: Path, config: dict, weights: dict[str, np.ndarray], dtype: str = "F32", shards: int = 1) -> Path:
    """Write a checkpoint folder as transformers lays it out."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: encoded(values, dtype) for name, values in weights.items()}
    if shards == 1:
        (folder / "model.safetensors").write_bytes(safetensors_bytes(tensors, {"format": "pt"}))
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = dict(list(tensors.items())[shard::shards])
        (folder / file).write_bytes(safetensors_bytes(part, {"format": "pt"}))
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_sparse(folder: Path, config: dict, dtype: str = "BF16") -> int:
    """Write a checkpoint of zeros that takes no room on the disk; its size in bytes."""
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config))
    header, offset = {}, 0
    for name, shape in shapes(config).items():
        end = offset + {"F32": 4, "BF16": 2}[dtype] * int(np.prod(shape))
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)
    return offset
