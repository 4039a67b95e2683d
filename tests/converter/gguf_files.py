"""Small GGUF files of random weights, written with the format's description alone."""

import math
import struct

import numpy as np

from converter.gguf_file import TYPES

KINDS = {name: kind for kind, (name, _, _) in TYPES.items()}
LLAMA = {
    "general.architecture": "llama", "llama.context_length": 77, "llama.embedding_length": 64, "llama.block_count": 2,
    "llama.feed_forward_length": 96, "llama.attention.head_count": 4, "llama.attention.head_count_kv": 2,
    "llama.attention.layer_norm_rms_epsilon": 1e-5, "llama.rope.freq_base": 10000.0,
}  # fmt: skip
QWEN3 = {
    **{key.replace("llama.", "qwen3."): value for key, value in LLAMA.items()}, "general.architecture": "qwen3",
    "qwen3.attention.key_length": 32, "qwen3.attention.value_length": 32, "qwen3.rope.freq_base": 1e6,
}  # fmt: skip
QWEN3_MOE = {
    **{key.replace("qwen3.", "qwen3moe."): value for key, value in QWEN3.items()}, "general.architecture": "qwen3moe",
    "qwen3moe.expert_count": 5, "qwen3moe.expert_used_count": 2, "qwen3moe.expert_feed_forward_length": 64,
}  # fmt: skip
VOCAB = 50


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(item) -> bytes:
    """A metadata value with its type before it; numpy arrays and lists of strings are arrays."""
    if isinstance(item, str):
        return struct.pack("<I", 8) + string(item)
    if isinstance(item, bool):
        return struct.pack("<I?", 7, item)
    if isinstance(item, int):
        return struct.pack("<II", 4, item)
    if isinstance(item, float):
        return struct.pack("<If", 6, item)
    if isinstance(item, list):
        return struct.pack("<IIQ", 9, 8, len(item)) + b"".join(map(string, item))
    kind = {"i4": 5, "u4": 4, "f4": 6}[item.dtype.str[1:]]
    return struct.pack("<IIQ", 9, kind, len(item)) + item.tobytes()


def gguf_bytes(metadata: dict, tensors: dict[str, tuple[str, tuple, bytes]], version: int = 3) -> bytes:
    """A file of ``name -> (type, shape, bytes)``."""
    alignment = metadata.get("general.alignment", 32)
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(string(key) + value(item) for key, item in metadata.items())
    offset, data = 0, b""
    for name, (kind, shape, raw) in tensors.items():
        head += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape[::-1], KINDS[kind], offset)
        raw += bytes(-len(raw) % alignment)
        offset += len(raw)
        data += raw
    return head + bytes(-len(head) % alignment) + data


def shapes(metadata: dict) -> dict[str, tuple[int, ...]]:
    """The tensors of a model that ties its output matrix to the embedding."""
    arch = metadata["general.architecture"]
    get = lambda key, default=None: metadata.get(f"{arch}.{key}", default)  # noqa: E731
    dim, hidden, heads = get("embedding_length"), get("feed_forward_length"), get("attention.head_count")
    head_dim = get("attention.key_length", dim // heads)
    q_dim, kv_dim = heads * head_dim, get("attention.head_count_kv") * head_dim
    result = {"token_embd.weight": (VOCAB, dim), "output_norm.weight": (dim,)}
    for layer in range(get("block_count")):
        names = {
            "attn_norm": (dim,), "ffn_norm": (dim,), "attn_q": (q_dim, dim), "attn_k": (kv_dim, dim),
            "attn_v": (kv_dim, dim), "attn_output": (dim, q_dim),
        }  # fmt: skip
        if arch == "qwen3moe":
            experts, width = get("expert_count"), get("expert_feed_forward_length")
            names |= {
                "ffn_gate_inp": (experts, dim), "ffn_gate_exps": (experts, width, dim),
                "ffn_up_exps": (experts, width, dim), "ffn_down_exps": (experts, dim, width),
            }  # fmt: skip
        else:
            names |= {"ffn_gate": (hidden, dim), "ffn_up": (hidden, dim), "ffn_down": (dim, hidden)}
        if arch.startswith("qwen3"):
            names |= {"attn_q_norm": (head_dim,), "attn_k_norm": (head_dim,)}
        result |= {f"blk.{layer}.{name}.weight": shape for name, shape in names.items()}
    return result


def random_blocks(rng, kind: str, shape: tuple[int, ...]) -> bytes:
    """Stored values of any bits, but for scales: these are small numbers."""
    _, block, block_bytes = TYPES[KINDS[kind]]
    count = math.prod(shape) // block
    if kind in ("F32", "F16"):
        return rng.standard_normal(count).astype("<f4" if kind == "F32" else "<f2").tobytes()
    raw = rng.integers(0, 256, (count, block_bytes), np.uint8)
    if kind == "BF16":
        return (rng.standard_normal(count).astype("<f4").view("<u4") >> 16).astype("<u2").tobytes()
    scales = rng.uniform(0.01, 0.1, (count, 1)).astype("<f2").view(np.uint8).reshape(count, 2)
    for place in {"Q6_K": (208,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q2_K": (80, 82), "Q3_K": (108,), "Q5_1": (0, 2),
                  "Q4_1": (0, 2)}.get(kind, (0,)):  # fmt: skip
        raw[:, place : place + 2] = scales
    return raw.tobytes()


def model(metadata: dict, kinds: dict[str, str] | str = "F32", seed: int = 0) -> dict[str, tuple[str, tuple, bytes]]:
    """Random tensors for a model; kinds: the type of all matrices, or of those whose names hold a key."""
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes(metadata).items():
        kind = kinds if isinstance(kinds, str) else next((k for part, k in kinds.items() if part in name), "F32")
        kind = "F32" if len(shape) == 1 else kind
        tensors[name] = kind, shape, random_blocks(rng, kind, shape)
    return tensors
