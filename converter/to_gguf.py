"""`.m` and `.t` -> GGUF: ``dllama-convert to-gguf``, so that a model can go to llama.cpp.

Q40 and Q80 are GGUF's Q4_0 and Q8_0: every tensor is copied as it is. Rows of q and k lie as llama.cpp wants them
(see gguf_model.py).
"""

import os
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import click
import numpy as np

from converter import gguf_file
from converter.gguf_model import ARCHITECTURES, ROPE_FACTORS, SAME, rope_factors, tensor_name, tensor_shape
from converter.gguf_tokenizer import tokenizer_metadata
from converter.progress import progress
from converter.tokenizer import read_tokenizer, tokenizer_files
from dllama.errors import FileError, FormatError
from dllama.formats import Activation, Arch, FloatType, ModelConfig, ModelFile, RopeType, TensorInfo
from dllama.formats.files import AtomicFile, refuse_overwriting

CHUNK_BYTES = 16 << 20
QUANTIZATION_VERSION = 2  # of llama.cpp's block formats

NAMES = {arch: name for name, arch in ARCHITECTURES.items()}
KINDS = {SAME[name]: kind for kind, (name, _, _) in gguf_file.TYPES.items() if name in SAME}
FILE_TYPES = {FloatType.F32: 0, FloatType.F16: 1, FloatType.Q40: 2, FloatType.Q80: 7}

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]


def to_gguf(
    model: str | os.PathLike, tokenizer: str | os.PathLike, out: str | os.PathLike, progress: Progress
) -> ModelConfig:
    """Write a model file and its tokenizer as the GGUF file ``out``, and return the model's shape.

    Raises FileError (FormatError) naming the file and the reason; ``out`` then is as it was.
    """
    refuse_overwriting(out, [model, *tokenizer_files(tokenizer)])
    vocabulary = read_tokenizer(tokenizer)
    with ModelFile(model) as file:
        config = file.config
        try:
            metadata = _metadata(config, os.fsencode(Path(model).stem).decode(errors="replace"))
        except ValueError as error:
            raise FormatError(model, str(error)) from None
        if len(vocabulary.pieces) > config.vocab_size:
            n_tokens = len(vocabulary.pieces)
            raise FormatError(tokenizer, f"{n_tokens:,} tokens, and the model has {config.vocab_size:,}")
        try:
            metadata |= tokenizer_metadata(vocabulary, config.vocab_size)
        except ValueError as error:
            raise FormatError(tokenizer, str(error)) from None

        stored = _stored_together(file.tensors())
        tensors = [(tensor_name(first), KINDS[first.float_type], tensor_shape(first, config)) for first, *_ in stored]
        factors = _rope_factors(config)
        if factors is not None:
            tensors.insert(0, (ROPE_FACTORS, KINDS[FloatType.F32], factors.shape))
        head, nbytes = gguf_file.header_bytes(metadata, tensors)
        with AtomicFile(out, len(head) + nbytes) as target, progress(f"Writing {Path(out).name}", nbytes) as report:
            target.write(head)
            if factors is not None:
                _write(target, [factors], report)
            for parts in stored:
                _write(target, (chunk for info in parts for chunk in _chunks(file, info)), report)
    return config


def _stored_together(tensors: Iterable[TensorInfo]) -> list[list[TensorInfo]]:
    """The tensors of the model file that make up each of llama.cpp's: one, or all experts' of a kind in a layer."""
    parts = defaultdict(list)
    for info in tensors:
        parts[tensor_name(info)].append(info)
    return list(parts.values())


def _chunks(file: ModelFile, info: TensorInfo) -> Iterator[np.ndarray]:
    """A tensor's bytes, a few megabytes at a time, whose pages are let go of behind them."""
    raw = file.raw(info.name, info.layer)
    step = max(1, CHUNK_BYTES // info.row_bytes)
    for start in range(0, info.rows, step):
        stop = min(start + step, info.rows)
        yield raw[start:stop]
        file.release(info.name, info.layer, range(start, stop))


def _write(target: AtomicFile, chunks, report: Callable[[int], None]) -> None:
    """One tensor, and what pads it."""
    nbytes = 0
    for chunk in chunks:
        target.write(chunk)
        nbytes += chunk.nbytes
        report(chunk.nbytes)
    end = gguf_file.padding(nbytes)
    target.write(end)
    report(len(end))


def _metadata(config: ModelConfig, name: str) -> dict[str, tuple]:
    """The model's part of the metadata. ValueError for a model that llama.cpp has no architecture for."""
    if config.arch not in NAMES:
        known = ", ".join(arch.name.lower() for arch in NAMES)
        raise ValueError(f"architecture {config.arch.name.lower()} cannot be written as GGUF (known: {known})")
    if config.activation is not Activation.SILU:
        raise ValueError(f"activation {config.activation.name} is not what llama.cpp computes for this architecture")
    if config.arch is Arch.LLAMA and config.rope_type is RopeType.HALF_SPLIT:
        raise ValueError("a llama model with half-split rotary pairs, which llama.cpp does not have")
    arch = NAMES[config.arch]
    integers = {
        "context_length": config.seq_len,
        "embedding_length": config.dim,
        "block_count": config.n_layers,
        "feed_forward_length": config.hidden_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "rope.dimension_count": config.head_dim,
        "vocab_size": config.vocab_size,
    }
    if config.arch.has_experts:
        integers |= {
            "expert_count": config.n_experts,
            "expert_used_count": config.n_active_experts,
            "expert_feed_forward_length": config.moe_hidden_dim,
        }
    return {
        "general.architecture": (gguf_file.STRING, arch),
        "general.name": (gguf_file.STRING, name),
        "general.file_type": (gguf_file.U32, FILE_TYPES[config.weight_type]),
        "general.quantization_version": (gguf_file.U32, QUANTIZATION_VERSION),
        **{f"{arch}.{key}": (gguf_file.U32, value) for key, value in integers.items()},
        f"{arch}.attention.layer_norm_rms_epsilon": (gguf_file.F32, config.norm_epsilon),
        f"{arch}.rope.freq_base": (gguf_file.F32, config.rope_theta),
    }


def _rope_factors(config: ModelConfig) -> np.ndarray | None:
    """Llama 3.1's frequency factors, float32 [head_dim / 2], which llama.cpp reads as a tensor."""
    if config.rope_type is not RopeType.LLAMA3_1:
        return None
    return rope_factors(
        config.rope_theta,
        config.head_dim,
        config.rope_scaling_factor,
        config.rope_scaling_low_freq_factor,
        config.rope_scaling_high_freq_factor,
        config.rope_scaling_orig_seq_len,
    ).astype("<f4")


@click.command("to-gguf")
@click.argument("model", type=click.Path(path_type=Path))
@click.argument("tokenizer", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="File to write.")
@click.option("--force", is_flag=True, help="Replace the output where it exists.")
def command(model: Path, tokenizer: Path, output: Path, force: bool) -> None:
    """Convert a .m file and its tokenizer to a GGUF file, which llama.cpp runs.

    MODEL is a .m file of any weight type: its weights are copied as they are. TOKENIZER is a .t file, or any other that
    dllama-convert tokenizer reads.

    \b
    Example:
      dllama-convert to-gguf qwen3-q80.m qwen3.t -o qwen3-q8_0.gguf
    """
    if os.path.exists(output) and not force:
        raise FileError(output, "exists already (--force replaces it)")
    config = to_gguf(model, tokenizer, output, progress)
    click.echo(
        f"{output}: {output.stat().st_size:,} bytes, {config.arch.name.lower()}, {config.n_layers} layers, "
        f"{config.weight_type.name.lower()}"
    )
