"""Small checkpoints of random weights in every form, written with the formats' descriptions alone."""

import json
import struct
from pathlib import Path

import numpy as np

from tests.converter.gguf_files import gguf_bytes
from tests.converter.torch_files import torch_bytes

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
QWEN3_MOE = {
    **QWEN3, "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 5, "num_experts_per_tok": 2,
    "moe_intermediate_size": 64, "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
    "tie_word_embeddings": False,
}  # fmt: skip
LLAMA3_1 = {
    **LLAMA,
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 32,
    },
}  # fmt: skip
CONFIGS = {"llama": LLAMA, "mistral": MISTRAL, "qwen3": QWEN3, "qwen3-moe": QWEN3_MOE, "llama3.1": LLAMA3_1}


def safetensors_bytes(tensors: dict[str, tuple[str, tuple, bytes]]) -> bytes:
    """A safetensors file of ``name -> (dtype, shape, bytes)``."""
    header = {"__metadata__": {"format": "pt"}}
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
            prefix + "self_attn.q_proj.weight": (q_dim, dim),
            prefix + "self_attn.k_proj.weight": (kv_dim, dim),
            prefix + "self_attn.v_proj.weight": (kv_dim, dim),
            prefix + "self_attn.o_proj.weight": (dim, q_dim),
        }
        ffn = prefix + "mlp."
        if "num_experts" in config:
            result |= {ffn + "gate.weight": (config["num_experts"], dim)}
            networks = [f"{ffn}experts.{expert}." for expert in range(config["num_experts"])]
            width = config["moe_intermediate_size"]
        else:
            networks, width = [ffn], hidden
        for network in networks:
            result |= {
                network + "gate_proj.weight": (width, dim),
                network + "up_proj.weight": (width, dim),
                network + "down_proj.weight": (dim, width),
            }
        if config["architectures"][0].startswith("Qwen3"):
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


def write_torch(path: Path, weights: dict[str, np.ndarray], dtype: str = "F32") -> Path:
    """Write float32 values as a torch checkpoint of ``dtype``."""
    path.write_bytes(torch_bytes({name: encoded(values, dtype) for name, values in weights.items()}))
    return path


def write(
    folder: Path,
    config: dict,
    weights: dict[str, np.ndarray],
    dtype: str = "F32",
    shards: int = 1,
    form: str = "safetensors",
) -> Path:
    """Write a checkpoint folder as transformers lays it out; form: "safetensors" or "bin"."""
    stem, pack = {"safetensors": ("model", safetensors_bytes), "bin": ("pytorch_model", torch_bytes)}[form]
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    tensors = {name: encoded(values, dtype) for name, values in weights.items()}
    if shards == 1:
        (folder / f"{stem}.{form}").write_bytes(pack(tensors))
        return folder
    weight_map = {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.{form}"
        part = dict(list(tensors.items())[shard::shards])
        (folder / file).write_bytes(pack(part))
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / f"{stem}.{form}.index.json").write_text(json.dumps(index))
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


def write_meta(folder: Path, config: dict, weights: dict[str, np.ndarray], shards: int = 1, split_rows: bool = False):
    """Write the weights of a llama as Meta lays a checkpoint out; the names and orders are those of Meta's code.

    split_rows: the shards hold rows of the embedding, as Llama 3's do, not columns
    """
    folder.mkdir(exist_ok=True)
    dim, hidden = config["hidden_size"], config["intermediate_size"]
    params = {
        "dim": dim, "n_layers": config["num_hidden_layers"], "n_heads": config["num_attention_heads"],
        "n_kv_heads": config["num_key_value_heads"], "vocab_size": -1, "norm_eps": config["rms_norm_eps"],
        "multiple_of": 32, "ffn_dim_multiplier": (hidden - 1) / int(8 * dim / 3), "rope_theta": config["rope_theta"],
        "use_scaled_rope": config["rope_scaling"] is not None, "max_seq_len": config["max_position_embeddings"],
    }  # fmt: skip
    (folder / "params.json").write_text(json.dumps(params))
    whole = {meta_name(name): meta_rows(name, values, config) for name, values in weights.items()}
    for rank in range(shards):
        part = {}
        for name, values in whole.items():
            by_columns = name.endswith(("wo.weight", "w2.weight")) or (name.startswith("tok") and not split_rows)
            if values.ndim == 2:
                values = np.ascontiguousarray(np.split(values, shards, axis=1 if by_columns else 0)[rank])
            part[name] = values
        write_torch(folder / f"consolidated.{rank:02}.pth", part | {"rope.freqs": np.ones(8, np.float32)})
    return folder


def write_gguf(path: Path, config: dict, weights: dict[str, np.ndarray], dtype: str = "F32") -> Path:
    """Write the weights of a llama as llama.cpp's converter lays them out; norms are F32."""
    metadata = {
        "general.architecture": "llama", "llama.context_length": config["max_position_embeddings"],
        "llama.embedding_length": config["hidden_size"], "llama.block_count": config["num_hidden_layers"],
        "llama.feed_forward_length": config["intermediate_size"],
        "llama.attention.head_count": config["num_attention_heads"],
        "llama.attention.head_count_kv": config["num_key_value_heads"],
        "llama.attention.layer_norm_rms_epsilon": config["rms_norm_eps"], "llama.rope.freq_base": config["rope_theta"],
    }  # fmt: skip
    tensors = {}
    for name, values in weights.items():
        values = meta_rows(name, values, config)
        tensors[gguf_name(name)] = encoded(values, dtype if values.ndim == 2 else "F32")
    path.write_bytes(gguf_bytes(metadata, tensors))
    return path


def gguf_name(name: str) -> str:
    """llama.cpp's name for a tensor of a Hugging Face llama."""
    for theirs, ours in {
        "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "model.layers": "blk",
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.down_proj": "ffn_down",
        "mlp.up_proj": "ffn_up", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }.items():  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def meta_name(name: str) -> str:
    """Meta's name for a tensor of a Hugging Face llama."""
    for theirs, ours in {
        "model.embed_tokens": "tok_embeddings", "model.norm": "norm", "lm_head": "output", "model.layers": "layers",
        "self_attn.q_proj": "attention.wq", "self_attn.k_proj": "attention.wk", "self_attn.v_proj": "attention.wv",
        "self_attn.o_proj": "attention.wo", "mlp.gate_proj": "feed_forward.w1", "mlp.down_proj": "feed_forward.w2",
        "mlp.up_proj": "feed_forward.w3", "input_layernorm": "attention_norm", "post_attention_layernorm": "ffn_norm",
    }.items():  # fmt: skip
        name = name.replace(theirs, ours)
    return name


def meta_rows(name: str, values: np.ndarray, config: dict) -> np.ndarray:
    """Rows of q and k turn pairs (2i, 2i+1) in Meta's code, (i, i + head_dim/2) in transformers'."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return values
    head_dim = config["hidden_size"] // config["num_attention_heads"]
    order = np.arange(head_dim).reshape(2, -1).T.ravel()  # 0, head_dim/2, 1, head_dim/2 + 1, ...
    return values.reshape(-1, head_dim, values.shape[1])[:, order].reshape(values.shape)
