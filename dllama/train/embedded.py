"""Trains the embedded model: a small LLaMA, from random weights, on the grade-school problems of GSM8K.

Needs the ``train`` extra. ``python -m dllama.train.embedded --help`` tells the rest; the folder that it writes is
an ordinary Hugging Face checkpoint, which ``dllama-convert hf`` turns into the Q40 file that the package ships.
"""

from pathlib import Path

import click
import sentencepiece

from dllama.errors import DllamaError
from dllama.train.corpus import encode, read_problems, train_vocabulary

try:
    import torch
    import torch.nn.functional as F
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging

    from dllama.train.trainer import Budget, Trainer, negative_log_likelihood, train
except ImportError as error:
    raise SystemExit(f"Error: {error.name} is missing; install what training needs: pip install '.[train]'") from None

VALIDATION_PROBLEMS = 128  # kept out of training, to choose the best checkpoint without looking at the test set


def float32_attention(module, query, key, value, attention_mask, **_):
    """Causal attention outside autocast: PyTorch's CPU kernel takes half as long in float32 as in bf16 at these sizes.

    query is [rows, heads, length, head_dim], key and value have the kv heads; returns [rows, length, heads, head_dim].
    """
    groups = module.num_key_value_groups
    with torch.autocast("cpu", enabled=False):
        key, value = (x.float().repeat_interleave(groups, dim=1) for x in (key, value))
        return F.scaled_dot_product_attention(query.float(), key, value, is_causal=True).transpose(1, 2), None


AttentionInterface.register("float32_attention", float32_attention)


def build_model(config: LlamaConfig, dropout: float) -> LlamaForCausalLM:
    """A LLaMA with random weights. Dropout sits on what each block adds to the residual stream (transformers' LLaMA
    has none there), because the text is small enough to be learnt by heart."""
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("float32_attention")
    for layer in model.model.layers:
        for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
            projection.register_forward_hook(lambda module, _, out: F.dropout(out, dropout, module.training))
    return model


def report(out: Path, texts: list[str], vocabulary: sentencepiece.SentencePieceProcessor, batch: int) -> str:
    """Perplexity of the model in ``out``, in float32, on each problem of ``texts`` that its context holds.
    Raises ValueError when it holds none."""
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    fits = [
        (text, ids)
        for text, ids in zip(texts, encode(texts, vocabulary), strict=True)
        if len(ids) <= model.config.max_position_embeddings
    ]
    if not fits:
        raise ValueError(f"no test problem fits the context of {model.config.max_position_embeddings} tokens")
    nats, tokens = negative_log_likelihood(model, [ids for _, ids in fits], batch, bf16=False)
    n_bytes = sum(len(text.encode()) for text, _ in fits)
    per_token, per_byte = (torch.tensor(nats / n).exp().item() for n in (tokens, n_bytes))
    return (
        f"test: {len(fits)} of {len(texts)} problems fit the context; {tokens} tokens, {n_bytes} bytes; "
        f"perplexity {per_token:.3f} per token, {per_byte:.4f} per byte"
    )


@click.command(context_settings={"show_default": True})
@click.option(
    "--data",
    type=click.Path(path_type=Path),
    default="../shared/data",
    help="Folder with gsm8k_train.jsonl and gsm8k_test.jsonl.",
)
@click.option(
    "--out",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder to write: config.json, model.safetensors, tokenizer.model, checkpoint.pt.",
)
@click.option("--minutes", type=click.FloatRange(min=0.01), default=90, help="How long to train.")
@click.option("--steps", type=click.IntRange(min=1), help="Train this many steps instead; repeats exactly.")
@click.option("--resume", is_flag=True, help="Continue from OUT/checkpoint.pt.")
@click.option("--save-every", type=click.FloatRange(min=0), default=240, help="Seconds between checkpoints.")
@click.option("--vocab-size", type=click.IntRange(min=288), default=1152)
@click.option("--dim", type=click.IntRange(min=32), default=288)
@click.option("--hidden-dim", type=click.IntRange(min=32), default=768)
@click.option("--layers", type=click.IntRange(min=1), default=4)
@click.option("--heads", type=click.IntRange(min=1), default=16)
@click.option("--kv-heads", type=click.IntRange(min=1), default=8)
@click.option("--head-dim", type=click.IntRange(min=2), default=32)
@click.option("--context", type=click.IntRange(min=8), default=512)
@click.option("--batch", type=click.IntRange(min=1), default=8, help="Sequences of a full context in a step.")
@click.option("--learning-rate", type=float, default=4e-3, help="Highest learning rate.")
@click.option("--weight-decay", type=float, default=0.1)
@click.option("--dropout", type=click.FloatRange(0, 0.9), default=0.05)
@click.option("--precision", type=click.Choice(["bf16", "f32"]), default="bf16", help="Of the products in training.")
@click.option("--seed", type=int, default=2)
def main(
    data,
    out,
    minutes,
    steps,
    resume,
    save_every,
    vocab_size,
    dim,
    hidden_dim,
    layers,
    heads,
    kv_heads,
    head_dim,
    context,
    batch,
    learning_rate,
    weight_decay,
    dropout,
    precision,
    seed,
):
    """Train a small LLaMA on GSM8K and report its perplexity on the test problems.

    The default shape has eight groups of heads, each as wide as two blocks of 32 weights, so that up to eight nodes
    can share it.
    """
    if heads % kv_heads or dim % heads or context % 2:
        raise click.UsageError("--heads must be a multiple of --kv-heads and divide --dim; --context must be even")
    if any(n % 32 for n in (vocab_size, dim, hidden_dim, heads * head_dim)):
        raise click.UsageError("--vocab-size, --dim, --hidden-dim and heads x head-dim must be multiples of 32")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        texts, test_texts = read_problems(data / "gsm8k_train.jsonl"), read_problems(data / "gsm8k_test.jsonl")
        out.mkdir(parents=True, exist_ok=True)
        tokenizer = out / "tokenizer.model"
        if not (resume and tokenizer.exists()):
            tokenizer.write_bytes(train_vocabulary(texts, vocab_size))
        vocabulary = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        held_out = min(VALIDATION_PROBLEMS, len(texts) // 2)
        documents, validation = encode(texts[held_out:], vocabulary), encode(texts[:held_out], vocabulary)
        validation = [ids[: context + 1] for ids in validation]

        torch.manual_seed(seed)
        config = LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=dim,
            intermediate_size=hidden_dim,
            num_hidden_layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=head_dim,
            max_position_embeddings=context,
            rms_norm_eps=1e-5,
            tie_word_embeddings=True,
            bos_token_id=vocabulary.bos_id(),
            eos_token_id=vocabulary.eos_id(),
        )
        model = build_model(config, dropout).train()
        budget = Budget(steps, True) if steps else Budget(60 * minutes, False)
        trainer = Trainer(
            model,
            documents,
            budget,
            seed=seed,
            batch=batch,
            length=context,
            learning_rate=learning_rate,
            weight_decay=weight_decay,
            bf16=precision == "bf16",
        )
        if resume:
            trainer.restore(out / "checkpoint.pt")
        click.echo(f"{model.num_parameters():,} weights; {sum(map(len, documents)):,} tokens in an epoch")
        train(trainer, validation, out, save_every)
        click.echo(report(out, test_texts, vocabulary, batch))
    except (DllamaError, ValueError) as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"{error.filename or out}: {error.strerror}") from None


if __name__ == "__main__":
    main()
