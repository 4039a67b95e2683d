"""A checkpoint folder as Meta publishes Llama: `params.json` and the shards `consolidated.00.pth`, `.01.pth`, ...

Each shard is one rank of a tensor-parallel run: it holds a part of every matrix and a copy of every norm.
"""

import re
from pathlib import Path

from converter.checkpoint import Checkpoint, Source, match, names_in
from converter.tensors import Joined
from converter.torch_file import read_torch_file
from converter.values import epsilon, number, whole
from dllama.errors import FileError, FormatError
from dllama.formats import Arch, FloatType, ModelConfig, RopeType, TensorInfo
from dllama.formats.json_file import read_json
from dllama.formats.tensor import Tensor

PARAMS = "params.json"
SHARD = re.compile(r"consolidated\.(\d\d)\.pth")

WHOLE_MODEL = {"embedding": "tok_embeddings.weight", "final_norm": "norm.weight", "output": "output.weight"}
IN_LAYER = {
    "q": "attention.wq.weight",
    "k": "attention.wk.weight",
    "v": "attention.wv.weight",
    "o": "attention.wo.weight",
    "w1": "feed_forward.w1.weight",
    "w2": "feed_forward.w2.weight",
    "w3": "feed_forward.w3.weight",
    "attention_norm": "attention_norm.weight",
    "ffn_norm": "ffn_norm.weight",
}
SPLIT_BY_COLUMNS = ("attention.wo.weight", "feed_forward.w2.weight")  # the shards' products are summed
BUFFERS = ("rope.freqs",)  # computed values that some checkpoints store

SCALED_ROPE = {  # Llama 3.1's, in Meta's own code
    "rope_scaling_factor": 8.0,
    "rope_scaling_low_freq_factor": 1.0,
    "rope_scaling_high_freq_factor": 4.0,
    "rope_scaling_orig_seq_len": 8192,
}
LLAMA_3_2 = {(2048, 16), (3072, 28)}  # dim and layers of the models whose factor is 32; their params.json cannot say


def open_folder(folder: Path, weight_type: FloatType, seq_len: int | None = None) -> Checkpoint:
    """The checkpoint in a folder; seq_len: a shorter context than the model's own, or None.

    Raises FileError (FormatError) naming the file and the reason.
    """
    params, files = folder / PARAMS, shard_files(folder)
    shards = [read_torch_file(file) for file in files]
    vocab_size = _vocab_size(files[0], shards[0], len(shards))
    try:
        config = parse_params(read_json(params), weight_type, vocab_size, seq_len)
    except ValueError as error:
        raise FormatError(params, str(error)) from None
    _check_count(files, shards, config)
    tensors = join(files, shards, config)
    sources = match(folder, config, tensors, checkpoint_name, lambda name: name.endswith(BUFFERS), PARAMS)
    return Checkpoint("Meta folder", folder, config, sources, [params, *files])


def shard_files(folder: Path) -> list[Path]:
    """The shards in order; FileError where there is none, or a number is left out."""
    found = {int(m[1]): folder / m[0] for m in map(SHARD.fullmatch, names_in(folder)) if m}
    if not found:
        raise FileError(folder, "holds no consolidated.00.pth")
    for rank in range(max(found)):
        if rank not in found:
            last = found[max(found)].name
            raise FileError(folder / f"consolidated.{rank:02}.pth", f"is missing, and {last} is there")
    return [found[rank] for rank in sorted(found)]


def parse_params(values: dict, weight_type: FloatType, vocab_size: int, seq_len: int | None = None) -> ModelConfig:
    """The model that the object in params.json describes. ValueError with the reason.

    vocab_size: the rows of the output matrix; params.json of Llama 1 and 2 says -1
    """
    for name in ("moe", "quantization_args", "vision_chunk_size"):
        if values.get(name):
            raise ValueError(f"{name} is set, and such a model cannot be converted (known: Llama of text alone)")
    dim, n_heads, n_layers = whole(values, "dim"), whole(values, "n_heads"), whole(values, "n_layers")
    if n_heads < 1 or dim % n_heads:
        raise ValueError(f"dim {dim} cannot be split over {n_heads} heads")
    said = whole(values, "vocab_size", -1)
    if said not in (-1, vocab_size):
        raise ValueError(f"vocab_size is {said}, and the shards hold {vocab_size} rows of the output matrix")
    theta = number(values.get("rope_theta", 10000.0), "rope_theta")
    norm_epsilon = epsilon(values.get("norm_eps", 1e-5), "norm_eps")
    scaled = bool(values.get("use_scaled_rope", False))
    longest = whole(values, "max_seq_len", 0) or usual_context(scaled, theta, norm_epsilon)
    if seq_len is not None and seq_len > longest:
        raise ValueError(f"a context of {seq_len} is longer than the model's own, {longest}")
    scaling = SCALED_ROPE if scaled else {}
    if scaled and (dim, n_layers) in LLAMA_3_2:
        scaling = SCALED_ROPE | {"rope_scaling_factor": 32.0}
    return ModelConfig(
        arch=Arch.LLAMA,
        dim=dim,
        hidden_dim=whole(values, "hidden_dim", 0) or hidden_dim(values, dim),
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=whole(values, "n_kv_heads", n_heads),
        head_dim=whole(values, "head_dim", dim // n_heads),
        vocab_size=vocab_size,
        seq_len=seq_len or longest,
        norm_epsilon=norm_epsilon,
        rope_theta=theta,
        rope_type=RopeType.LLAMA3_1 if scaled else RopeType.LLAMA,
        **scaling,
        weight_type=weight_type,
    )


def hidden_dim(values: dict, dim: int) -> int:
    """Two thirds of 4 * dim, times ffn_dim_multiplier, rounded up to a multiple of multiple_of, as in Meta's code."""
    size = int(2 * 4 * dim / 3)
    multiplier = values.get("ffn_dim_multiplier")
    if multiplier is not None:
        multiplier = number(multiplier, "ffn_dim_multiplier")
        if not 0 < multiplier < 100:
            raise ValueError(f"ffn_dim_multiplier is {multiplier}")
        size = int(multiplier * size)
    unit = whole(values, "multiple_of", 256)
    if unit < 1:
        raise ValueError(f"multiple_of is {unit}")
    return -(-size // unit) * unit


def usual_context(scaled: bool, theta: float, norm_epsilon: float) -> int:
    """The context that the model was trained for, which params.json does not say; the parts that differ tell."""
    if scaled:
        return 131072  # Llama 3.1 and later
    if theta != 10000:
        return 8192 if theta == 500000 else 16384  # Llama 3; Code Llama
    return 4096 if norm_epsilon == 1e-5 else 2048  # Llama 2; Llama 1


def checkpoint_name(info: TensorInfo) -> str:
    """The name in the checkpoint of a tensor of the model file."""
    return WHOLE_MODEL[info.name] if info.layer is None else f"layers.{info.layer}.{IN_LAYER[info.name]}"


def _vocab_size(file: Path, shard: dict[str, Tensor], n_shards: int) -> int:
    """Rows of the output matrix, which every Llama splits by rows; the embedding is split by columns up to Llama 2."""
    output = shard.get(WHOLE_MODEL["output"])
    if output is None or len(output.shape) != 2:
        raise FormatError(file, f"tensor {WHOLE_MODEL['output']} is missing or not a matrix")
    return output.shape[0] * n_shards


def _check_count(files: list[Path], shards: list[dict[str, Tensor]], config: ModelConfig) -> None:
    """FileError where the parts of the first matrix do not add up, which a lost last shard leaves."""
    name = checkpoint_name(TensorInfo("w1", 0, 0, 0, config.weight_type, 0))
    part = shards[0].get(name)
    if part is None or not part.shape or not part.shape[0]:
        raise FormatError(files[0], f"tensor {name} is missing or empty")
    if part.shape[0] * len(shards) != config.hidden_dim and config.hidden_dim % part.shape[0] == 0:
        needed = config.hidden_dim // part.shape[0]
        found = "1 shard" if len(shards) == 1 else f"{len(shards)} shards"
        raise FileError(files[0].parent, f"holds {found}, and {PARAMS} with the size of the first calls for {needed}")


def join(files: list[Path], shards: list[dict[str, Tensor]], config: ModelConfig) -> dict[str, Source]:
    """The whole model's tensors. FormatError where the shards cannot be of one model."""
    for file, shard in zip(files[1:], shards[1:], strict=True):
        _check_kinship(files[0], shards[0], file, shard)
    return {name: _joined([shard[name] for shard in shards], config.dim) for name in shards[0]}


def _check_kinship(first_file: Path, first: dict[str, Tensor], file: Path, shard: dict[str, Tensor]) -> None:
    """FormatError where two shards differ in what all shards of a model share: names, shapes, types and norms."""
    unlike = f"{first_file.name}: shards of different models"
    for name in sorted(first.keys() ^ shard.keys()):
        here, there = ("lacks", "has") if name in first else ("has", "lacks")
        raise FormatError(file, f"{here} tensor {name}, which {first_file.name} {there}: shards of different models")
    for name, tensor in first.items():
        other = shard[name]
        if (other.shape, other.dtype) != (tensor.shape, tensor.dtype):
            here, there = f"{other.dtype} {list(other.shape)}", f"{tensor.dtype} {list(tensor.shape)}"
            raise FormatError(file, f"tensor {name} is {here}, and {there} in {unlike}")
        if name.endswith("norm.weight") and (tensor.read(0, tensor.nbytes) != other.read(0, other.nbytes)).any():
            raise FormatError(file, f"tensor {name} is not that of {unlike}")


def _joined(parts: list[Tensor], dim: int) -> Source:
    first = parts[0]
    if len(parts) == 1 or len(first.shape) != 2:
        return first
    by_columns = first.name.endswith(SPLIT_BY_COLUMNS)
    if first.name == WHOLE_MODEL["embedding"]:
        by_columns = first.shape[1] != dim  # Llama 3 splits it by rows
    return Joined(tuple(parts), axis=1 if by_columns else 0)
