"""Synthetic models: random weights in the shape of a real model, so that speed is measured without a download.

    python -m bench.synth tinyllama-1.1b OUT.m [--gguf OUT.gguf] [--tokenizer OUT.t]

The matrices are random Q40 blocks: uniform nibbles, and scales of either sign sized so that a unit input gives a unit
output; what is added to the residual stream shrinks with the depth. Activations thus stay of order one through all
layers, as in a trained model, and no kernel meets infinities, zeros or denormals that would change its speed.

The `.m` and the GGUF hold the same bytes, tensor by tensor: Q40 is GGUF's Q4_0, and both keep the rows of q and k in
the order of interleaved rotary pairs. The embedding is F32 in both; it is read one row a token.
"""

import argparse
import itertools
import math
import os
import string
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from dllama.errors import DllamaError, FileError
from dllama.formats import Arch, FloatType, ModelConfig, ModelWriter, TensorInfo, tensor_layout
from dllama.formats.vocabulary import Vocabulary, write_t

BLOCK = np.dtype([("d", "<f2"), ("q", "u1", 16)])  # one Q40 block: 32 values
NIBBLE_RMS = math.sqrt(21.5)  # of q - 8, q uniform in 0..15
SPECIAL = ("<unk>", "<s>", "</s>")
BOS, EOS = 1, 2


def _llama(dim, hidden_dim, n_layers, n_heads, n_kv_heads, vocab_size, seq_len, rope_theta=10000.0) -> ModelConfig:
    return ModelConfig(
        arch=Arch.LLAMA,
        dim=dim,
        hidden_dim=hidden_dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=dim // n_heads,
        vocab_size=vocab_size,
        seq_len=seq_len,
        rope_theta=rope_theta,
    )


SHAPES = {
    "tiny": _llama(64, 192, 2, 4, 2, 512, 256),
    "small": _llama(512, 1536, 8, 8, 4, 4096, 2048),
    "tinyllama-1.1b": _llama(2048, 5632, 22, 32, 4, 32000, 2048),
    "llama2-7b": _llama(4096, 11008, 32, 32, 32, 32000, 4096),
    "llama2-13b": _llama(5120, 13824, 40, 40, 40, 32000, 4096),
    "llama2-70b-8-layers": _llama(8192, 28672, 8, 64, 8, 32000, 4096),  # of its 80; each costs what it costs there
    "llama3-8b": _llama(4096, 14336, 32, 32, 8, 128256, 8192, rope_theta=500000.0),
}

GGUF_NAMES = {
    "embedding": "token_embd",
    "q": "attn_q",
    "k": "attn_k",
    "v": "attn_v",
    "o": "attn_output",
    "w1": "ffn_gate",
    "w2": "ffn_down",
    "w3": "ffn_up",
    "attention_norm": "attn_norm",
    "ffn_norm": "ffn_norm",
    "final_norm": "output_norm",
    "output": "output",
}


# --- weights ------------------------------------------------------------------------------------------------------


def tensors(config: ModelConfig, seed: int = 0) -> Iterator[tuple[TensorInfo, np.ndarray]]:
    """Every tensor of the model in file order: float32 [rows, columns], or uint8 [rows, row_bytes] of Q40 blocks."""
    for i, info in enumerate(tensor_layout(config, 0)):
        rng = np.random.Generator(np.random.SFC64([seed, i]))
        if info.is_vector:
            yield info, rng.uniform(0.8, 1.2, (1, info.columns)).astype(np.float32)
        elif info.float_type is FloatType.F32:
            yield info, rng.standard_normal((info.rows, info.columns), np.float32)
        else:
            yield info, _q40_matrix(info, config.n_layers, rng)


def _q40_matrix(info: TensorInfo, n_layers: int, rng: np.random.Generator) -> np.ndarray:
    """Random Q40 blocks, uint8 [rows, row_bytes]; values have variance 1 / columns, less for o and w2."""
    nbytes = info.rows * info.row_bytes
    raw = rng.bit_generator.random_raw(-(-nbytes // 8)).view(np.uint8)[:nbytes].reshape(-1, BLOCK.itemsize)
    rms = 1 / math.sqrt(info.columns)
    if info.name in ("o", "w2"):
        rms /= math.sqrt(2 * n_layers)  # GPT-2's rule: 2 * n_layers of these are added up
    # Scales of either sign, as Q40's quantiser gives them, spread by a factor of three: a random byte picks one.
    size = np.linspace(0.5, 1.5, 128) * math.sqrt(12 / 13)  # mean square one
    scales = (np.concatenate([size, -size]) * (rms / NIBBLE_RMS)).astype("<f2")
    blocks = raw.view(BLOCK).reshape(info.rows, -1)
    blocks["d"] = scales[raw[:, :1]].reshape(blocks.shape)
    if info.name == "output":
        blocks["d"][: len(SPECIAL)] = 0  # so that greedy decoding never ends the text
    return blocks.view(np.uint8).reshape(info.rows, info.row_bytes)


# --- files --------------------------------------------------------------------------------------------------------


def write(shape: str, model: Path, gguf: Path | None = None, tokenizer: Path | None = None, seed: int = 0) -> None:
    """Write the weights of a shape of SHAPES, deterministic by `seed`, tensor by tensor into both files at once."""
    config = SHAPES[shape]
    if tokenizer:
        write_tokenizer(tokenizer, config)
    peer = GgufFile(gguf, shape, config) if gguf else None
    try:
        with ModelWriter(model, config) as writer:
            for info, data in tensors(config, seed):
                writer.write(info.name, info.layer, data)
                if peer:
                    peer.write(data)
            if peer:
                peer.close()
    finally:
        if peer:
            peer.remove_partial()


class GgufFile:
    """A GGUF of architecture llama, written tensor by tensor in the order of the `.m`; it appears when complete."""

    def __init__(self, path: Path, shape: str, config: ModelConfig):
        try:
            import gguf
        except ImportError:
            raise FileError(path, "writing GGUF needs the bench extra: pip install '.[bench]'") from None
        self.path, self.partial = Path(path), Path(f"{path}.partial")
        self.out = out = gguf.GGUFWriter(self.partial, "llama")
        out.add_name(f"{shape} (synthetic)")
        out.add_context_length(config.seq_len)
        out.add_embedding_length(config.dim)
        out.add_block_count(config.n_layers)
        out.add_feed_forward_length(config.hidden_dim)
        out.add_head_count(config.n_heads)
        out.add_head_count_kv(config.n_kv_heads)
        out.add_layer_norm_rms_eps(config.norm_epsilon)
        out.add_rope_dimension_count(config.head_dim)
        out.add_rope_freq_base(config.rope_theta)
        out.add_vocab_size(config.vocab_size)
        out.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
        pieces = vocabulary(config.vocab_size)
        kinds = gguf.TokenType
        special = [kinds.UNKNOWN, kinds.CONTROL, kinds.CONTROL] + [kinds.BYTE] * 256
        out.add_tokenizer_model("llama")
        out.add_token_list([piece.replace(" ", "\u2581") for piece in pieces])
        out.add_token_scores([-float(i) for i in range(len(pieces))])
        out.add_token_types(special + [kinds.NORMAL] * (len(pieces) - len(special)))
        out.add_bos_token_id(BOS)
        out.add_eos_token_id(EOS)
        for info in tensor_layout(config, 0):
            name = GGUF_NAMES[info.name] + ".weight"
            name = name if info.layer is None else f"blk.{info.layer}.{name}"
            if info.float_type is FloatType.F32:
                out.add_tensor_info(name, info.shape, np.dtype(np.float32), info.nbytes)
            else:
                raw_shape = (info.rows, info.row_bytes)
                kind = gguf.GGMLQuantizationType.Q4_0
                out.add_tensor_info(name, raw_shape, np.dtype(np.uint8), info.nbytes, kind)
        out.write_header_to_file()
        out.write_kv_data_to_file()
        out.write_ti_data_to_file()

    def write(self, data: np.ndarray) -> None:
        """Write the next tensor."""
        self.out.write_tensor_data(data)

    def close(self) -> None:
        """Give the file its name."""
        self.out.close()
        os.replace(self.partial, self.path)

    def remove_partial(self) -> None:
        """Remove what was written where `close` was not reached."""
        self.partial.unlink(missing_ok=True)


# --- tokenizer ----------------------------------------------------------------------------------------------------


def vocabulary(size: int) -> list[str]:
    """`size` pieces: the special ones, a piece for each byte, the letters, then made-up words; a space is a space."""
    words = (" " + "".join(letters) for letters in itertools.product(string.ascii_lowercase, repeat=4))
    pieces = itertools.chain(SPECIAL, (f"<0x{i:02X}>" for i in range(256)), " " + string.ascii_letters, words)
    return list(itertools.islice(pieces, size))


def write_tokenizer(path: Path, config: ModelConfig) -> None:
    """Write the vocabulary as a `.t` file."""
    pieces = [piece.encode() for piece in vocabulary(config.vocab_size)]
    write_t(path, Vocabulary(pieces, [-float(i) for i in range(len(pieces))], bos_id=BOS, eos_ids=(EOS,)))


def main() -> None:
    parser = argparse.ArgumentParser(description="Write random Q40 weights in the shape of a real model.")
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("model", type=Path, metavar="OUT.m")
    parser.add_argument("--gguf", type=Path, metavar="OUT.gguf", help="the same weights for llama.cpp")
    parser.add_argument("--tokenizer", type=Path, metavar="OUT.t", help="a made-up vocabulary of the right size")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    start = time.perf_counter()
    try:
        write(options.shape, options.model, options.gguf, options.tokenizer, options.seed)
    except DllamaError as error:
        sys.exit(f"Error: {error}")
    files = [path for path in (options.model, options.gguf, options.tokenizer) if path]
    sizes = ", ".join(f"{path} {path.stat().st_size / 1e6:,.1f} MB" for path in files)
    print(f"{sizes}, {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
