"""A Hugging Face checkpoint folder: `config.json`, and safetensors or `pytorch_model.bin` files, sharded or not."""

import os
from collections.abc import Callable
from pathlib import Path

from converter.checkpoint import Checkpoint, Source, match
from converter.hf_config import read_config
from converter.tensors import HalfSplit
from converter.torch_file import read_torch_file
from dllama.errors import FileError, FormatError
from dllama.formats import FloatType, ModelConfig, TensorInfo
from dllama.formats.json_file import read_json
from dllama.formats.rotary import is_reordered
from dllama.formats.safetensors import read_safetensors
from dllama.formats.tensor import Tensor

CONFIG = "config.json"
Reader = Callable[[str | os.PathLike], dict[str, Tensor]]
FORMS: dict[str, Reader] = {"model.safetensors": read_safetensors, "pytorch_model.bin": read_torch_file}
"""File of a checkpoint in one piece -> what reads it; the first that is there counts. A sharded one has an index of
this name and ".index.json" instead."""

WHOLE_MODEL = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
IN_LAYER = {
    "q": "self_attn.q_proj.weight",
    "k": "self_attn.k_proj.weight",
    "v": "self_attn.v_proj.weight",
    "o": "self_attn.o_proj.weight",
    "w1": "mlp.gate_proj.weight",
    "w2": "mlp.down_proj.weight",
    "w3": "mlp.up_proj.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
    "attention_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "router": "mlp.gate.weight",
}
OF_EXPERT = {"w1": "gate_proj.weight", "w2": "down_proj.weight", "w3": "up_proj.weight"}
BUFFERS = ("rotary_emb.inv_freq",)  # computed values that some checkpoints store


def open_folder(folder: Path, weight_type: FloatType, seq_len: int | None = None) -> Checkpoint:
    """The checkpoint in a folder; seq_len: a shorter context than the model's own, or None.

    Raises FileError (FormatError) naming the file and the reason.
    """
    config, tied = read_config(folder, weight_type, seq_len)
    tensors, files = read_tensors(folder)
    # A checkpoint may store the output matrix even where it is the embedding.
    pairs = match(
        folder,
        config,
        tensors,
        lambda info: checkpoint_name(info, tied),
        lambda name: name.endswith(BUFFERS) or name == WHOLE_MODEL["output"],
        CONFIG,
    )
    sources = [(info, _reordered(info, tensor, config)) for info, tensor in pairs]
    return Checkpoint("Hugging Face folder", folder, config, sources, [folder / CONFIG, *files])


def read_tensors(folder: Path) -> tuple[dict[str, Tensor], list[Path]]:
    """Every tensor of a checkpoint folder by name, and the files read. FileError for a missing file, FormatError for a
    damaged one and for shards that the index does not describe."""
    for single, read in FORMS.items():
        index = folder / f"{single}.index.json"
        if os.path.exists(index):
            return _read_shards(index, read)
        if os.path.exists(folder / single):
            return read(folder / single), [folder / single]
    raise FileError(folder, f"holds no checkpoint (neither {' nor '.join(FORMS)}, nor an index of one)")


def _read_shards(index: Path, read: Reader) -> tuple[dict[str, Tensor], list[Path]]:
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(index, "has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or name != os.path.basename(name) or name in ("", ".", ".."):
            raise FormatError(index, f"names a file {name!r}, which is not a plain file name")
    files = {name: index.with_name(name) for name in sorted(set(weight_map.values()))}
    shards = {name: read(file) for name, file in files.items()}
    for tensor, name in weight_map.items():
        if tensor not in shards[name]:
            raise FormatError(files[name], f"lacks tensor {tensor}, which {index.name} places there")
    for name, tensors in shards.items():
        for tensor in tensors:
            if weight_map.get(tensor) != name and not tensor.endswith(BUFFERS):
                raise FormatError(files[name], f"holds tensor {tensor}, which {index.name} does not place there")
    return {tensor: shards[name][tensor] for tensor, name in weight_map.items()}, [index, *files.values()]


def checkpoint_name(info: TensorInfo, tied: bool) -> str:
    """The name in the checkpoint of a tensor of the model file; tied: the output matrix is the embedding."""
    if info.expert is not None:
        return f"model.layers.{info.layer}.mlp.experts.{info.expert}.{OF_EXPERT[info.kind]}"
    if info.layer is not None:
        return f"model.layers.{info.layer}.{IN_LAYER[info.name]}"
    return WHOLE_MODEL["embedding" if info.name == "output" and tied else info.name]


def _reordered(info: TensorInfo, tensor: Tensor, config: ModelConfig) -> Source:
    """The tensor with its rows in the model file's order: q and k of a llama turn interleaved pairs there."""
    if is_reordered(info.name, config):
        return HalfSplit(**vars(tensor), head_dim=config.head_dim)
    return tensor
