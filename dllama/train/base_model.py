"""The model that an adapter is trained for, as transformers computes it: a Hugging Face folder, or a `.m` file."""

from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils import logging

from dllama import embedded
from dllama.errors import FileError, ModelError
from dllama.formats import Activation, Arch, ModelConfig, ModelFile, RopeType
from dllama.formats.rotary import to_checkpoint_order
from dllama.targets import TARGETS
from dllama.tokenizer import Tokenizer, load_tokenizer
from dllama.train.hub_tokenizer import HubTokenizer

WHOLE_MODEL = {
    "embedding": "model.embed_tokens.weight",
    "final_norm": "model.norm.weight",
    "output": "lm_head.weight",
}
NORMS = {
    "attention_norm": "input_layernorm.weight",
    "ffn_norm": "post_attention_layernorm.weight",
    "q_norm": "self_attn.q_norm.weight",
    "k_norm": "self_attn.k_norm.weight",
}
IN_LAYER = NORMS | {target.matrix: f"{target.module}.weight" for target in TARGETS.values()}
ACTIVATIONS = {Activation.SILU: "silu", Activation.GELU: "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class BaseModel:
    """A model that stays as it is, and its tokenizer.

    name: what it was loaded from;  context: tokens that it was made for
    """

    model: PreTrainedModel
    tokenizer: Tokenizer
    name: str
    context: int


def load_base(path: Path | None, tokenizer: Path | None, dtype: torch.dtype) -> BaseModel:
    """The model at ``path``, a Hugging Face folder or a `.m` file; None is the embedded model.

    tokenizer: its tokenizer file; a folder may hold its own. dtype: of the weights, which are not trained.
    Raises FileError (FormatError) for files that cannot be used, ModelError for models that cannot be trained.
    """
    if path is not None and path.is_dir():
        base = _from_folder(path, tokenizer, dtype)
    else:
        if (path is None) != (tokenizer is None):
            raise ModelError(
                "--model FILE.m and --tokenizer come together: give both, or neither for the embedded model"
            )
        base = _from_file(path or embedded.model_path(), tokenizer or embedded.tokenizer_path(), dtype)
    n_tokens, n_rows = base.tokenizer.vocab_size, base.model.get_input_embeddings().num_embeddings
    if n_tokens > n_rows:
        raise ModelError(f"{base.name}: the tokenizer has {n_tokens} tokens and the model {n_rows}")
    base.model.requires_grad_(False)
    base.model.eval()  # no dropout: a resumed run then repeats what an uninterrupted one does
    return base


def _from_folder(path: Path, tokenizer: Path | None, dtype: torch.dtype) -> BaseModel:
    logging.disable_progress_bar()
    try:
        model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise FileError(path, f"cannot be loaded by transformers ({str(error).strip().splitlines()[0]})") from None
    own = load_tokenizer(tokenizer) if tokenizer else HubTokenizer(path)
    return BaseModel(model, own, str(path), model.config.max_position_embeddings)


def _from_file(path: Path, tokenizer: Path, dtype: torch.dtype) -> BaseModel:
    with ModelFile(path) as file:
        model = model_of_file(file, dtype)
        return BaseModel(model, load_tokenizer(tokenizer), str(path), file.config.seq_len)


def model_of_file(file: ModelFile, dtype: torch.dtype) -> PreTrainedModel:
    """The model in a `.m` file, its weights dequantised. ModelError for a mixture of experts."""
    config = file.config
    if config.arch.has_experts:
        raise ModelError(f"{file.path}: a mixture of experts is trained from its Hugging Face folder only")
    build, settings = (Qwen3ForCausalLM, Qwen3Config) if config.arch is Arch.QWEN3 else (LlamaForCausalLM, LlamaConfig)
    model = build(settings(**_settings(config))).to(dtype)
    state = model.state_dict()
    for info in file.tensors():
        name = WHOLE_MODEL[info.name] if info.layer is None else f"model.layers.{info.layer}.{IN_LAYER[info.name]}"
        values = file.f32(info.name, info.layer)
        state[name].copy_(torch.from_numpy(to_checkpoint_order(values, info.name, config).copy()))
        file.release(info.name, info.layer)
    return model


def _settings(config: ModelConfig) -> dict:
    settings = dict(
        vocab_size=config.vocab_size,
        hidden_size=config.dim,
        intermediate_size=config.hidden_dim,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.seq_len,
        rms_norm_eps=config.norm_epsilon,
        hidden_act=ACTIVATIONS[config.activation],
        rope_theta=config.rope_theta,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    if config.rope_type is RopeType.LLAMA3_1:
        settings["rope_scaling"] = dict(
            rope_type="llama3",
            factor=config.rope_scaling_factor,
            low_freq_factor=config.rope_scaling_low_freq_factor,
            high_freq_factor=config.rope_scaling_high_freq_factor,
            original_max_position_embeddings=config.rope_scaling_orig_seq_len,
        )
    return settings
