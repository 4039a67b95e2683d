"""A Hugging Face checkpoint folder -> a `.m` file, a few megabytes of rows at a time."""

import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from converter.hf_config import read_config
from converter.safetensors import READABLE, Tensor, open_checkpoint
from dllama.errors import FileError, FormatError
from dllama.formats import Arch, FloatType, ModelConfig, ModelWriter, TensorInfo, quantize, tensor_layout

CHUNK_BYTES = 8 << 20  # float32 rows that one thread holds at a time
THREADS = min(8, os.cpu_count() or 1)

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
}
BUFFERS = ("rotary_emb.inv_freq",)  # computed values that some checkpoints store


def convert(
    folder: str | os.PathLike,
    out: str | os.PathLike,
    weight_type: FloatType,
    seq_len: int | None = None,
    search_scales: bool = False,
    progress: Callable[[int], None] = lambda nbytes: None,
) -> ModelConfig:
    """Write the checkpoint in ``folder`` as the model file ``out``, and return its shape.

    seq_len: a shorter context than the model's own, or None
    search_scales: look for the Q40 scales of least error, which takes longer
    progress: called with the bytes of weights written since the last call
    Raises FileError (FormatError) naming the file and the reason; ``out`` then is as it was.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileError(folder, "not a folder with a checkpoint" if folder.exists() else "no such file or folder")
    config, tied = read_config(folder, weight_type, seq_len)
    sources = match(folder, config, tied, open_checkpoint(folder))
    try:
        writer = ModelWriter(out, config)
    except ValueError as error:
        raise FormatError(folder / "config.json", str(error)) from None
    with writer, ThreadPoolExecutor(THREADS) as pool:
        for info, source in sources:
            chunks = _in_order(pool, _jobs(info, source, config, search_scales))
            writer.write_chunks(info.name, info.layer, _counted(chunks, progress))
    return config


def match(folder: Path, config: ModelConfig, tied: bool, tensors: dict[str, Tensor]) -> list[tuple[TensorInfo, Tensor]]:
    """The checkpoint's tensor for each of the model file, in file order.

    FormatError names the first tensor that is missing, of the wrong shape or dtype, or left over.
    """
    pairs = []
    for info in tensor_layout(config):
        name = checkpoint_name(info, tied)
        source = tensors.get(name)
        if source is None:
            raise FormatError(folder, f"tensor {name} is missing")
        if source.shape != info.shape:
            raise FormatError(
                source.path, f"tensor {name} is {list(source.shape)}, config.json calls for {list(info.shape)}"
            )
        if source.dtype not in READABLE:
            raise FormatError(
                source.path, f"tensor {name} is {source.dtype}, which is not read (known: {', '.join(READABLE)})"
            )
        pairs.append((info, source))
    used = {source.name for _, source in pairs}
    # A checkpoint may store the output matrix even where it is the embedding.
    allowed = used | {WHOLE_MODEL["output"]}
    for name, tensor in tensors.items():
        if name not in allowed and not name.endswith(BUFFERS):
            raise FormatError(tensor.path, f"tensor {name} has no place in this architecture")
    return pairs


def checkpoint_name(info: TensorInfo, tied: bool) -> str:
    """The name in the checkpoint of a tensor of the model file."""
    if info.layer is not None:
        return f"model.layers.{info.layer}.{IN_LAYER[info.name]}"
    return WHOLE_MODEL["embedding" if info.name == "output" and tied else info.name]


def interleave_pairs(rows: np.ndarray, head_dim: int) -> np.ndarray:
    """Reorder rows of q or k, whole heads of them, from rotary pairs (i, i + head_dim/2) to pairs (2i, 2i+1).

    rows: [heads * head_dim, n] -> the same shape
    """
    halves = rows.reshape(-1, 2, head_dim // 2, rows.shape[1])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def _jobs(
    info: TensorInfo, source: Tensor, config: ModelConfig, search_scales: bool
) -> Iterator[Callable[[], np.ndarray]]:
    """One job for each chunk of rows: read, reorder, quantise; uint8 [rows, row_bytes]."""
    permuted = config.arch is Arch.LLAMA and info.name in ("q", "k")
    unit = config.head_dim if permuted else 1
    step = max(1, CHUNK_BYTES // (4 * info.columns * unit)) * unit

    def job(start: int, stop: int) -> np.ndarray:
        rows = source.rows(start, stop)
        if permuted:
            rows = interleave_pairs(rows, config.head_dim)
        try:
            return quantize(rows, info.float_type, search_scales)
        except ValueError as error:
            raise FormatError(source.path, f"tensor {source.name} has {error}") from None

    for start in range(0, info.rows, step):
        yield lambda start=start: job(start, min(start + step, info.rows))


def _in_order(pool: ThreadPoolExecutor, jobs: Iterable[Callable[[], np.ndarray]]) -> Iterator[np.ndarray]:
    """The jobs' results in order, with only a few jobs more than threads begun at a time."""
    begun = deque()
    for job in jobs:
        begun.append(pool.submit(job))
        if len(begun) > THREADS:
            yield begun.popleft().result()
    while begun:
        yield begun.popleft().result()


def _counted(chunks: Iterable[np.ndarray], progress: Callable[[int], None]) -> Iterator[np.ndarray]:
    for chunk in chunks:
        yield chunk
        progress(chunk.nbytes)
