"""Trains the embedded model: a small LLaMA, from random weights, on the grade-school problems of GSM8K.

Needs the ``train`` extra. ``python -m dllama.train.embedded --help`` tells the rest; the folder that it writes is
an ordinary Hugging Face checkpoint, which ``dllama-convert hf`` turns into the Q40 file that the package ships.
"""

import os
import time
from dataclasses import dataclass
from pathlib import Path

import click

try:
    import torch
    import torch.nn.functional as F
    from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
    from transformers.utils import logging
except ImportError as error:
    raise SystemExit(f"Error: {error.name} is missing; install what training needs: pip install '.[train]'") from None
import sentencepiece
from tqdm import tqdm

from dllama.errors import DllamaError, FileError
from dllama.train.corpus import encode, epoch_batches, read_problems, train_vocabulary

WARMUP = 0.02  # share of the budget in which the learning rate rises; it then falls in a straight line to zero
VALIDATION_PROBLEMS = 128  # kept out of training, to choose the best checkpoint without looking at the test set
SHORT_ROWS = 0.7  # share of the budget in which rows are half a context long, because attention costs half as much
LONGEST_STEP_S = 30.0  # a step seen to take longer is a paused process, and does not use up the time budget


@dataclass
class Budget:
    """How long to train: a number of steps, or minutes of running (``limit`` in steps or seconds)."""

    limit: float
    in_steps: bool
    used: float = 0.0

    def spend(self, seconds: float) -> None:
        self.used += 1 if self.in_steps else min(seconds, LONGEST_STEP_S)

    @property
    def share(self) -> float:
        """What is used of the whole, 0 to 1."""
        return min(self.used / self.limit, 1.0)


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


def build_optimizers(model: LlamaForCausalLM, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms (https://kellerjordan.github.io/posts/muon).

    Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, bf16: bool, reduction: str = "mean") -> torch.Tensor:
    """Cross entropy in nats of each next token of ``ids`` (int64 [rows, length]); ids below 0 are padding."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids[:, :-1].clamp(min=0), use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1, reduction=reduction)


@torch.no_grad()
def negative_log_likelihood(model: LlamaForCausalLM, documents: list, batch: int, bf16: bool) -> tuple[float, int]:
    """(nats, tokens predicted) over documents that each stand alone: all their tokens after bos, eos included."""
    model.eval()
    nats, tokens = 0.0, 0
    by_length = sorted(documents, key=len)  # so that little of a batch is padding
    for start in range(0, len(by_length), batch):
        rows = [torch.from_numpy(ids) for ids in by_length[start : start + batch]]
        padded = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)
        nats += loss_of(model, padded, bf16, "sum").item()
        tokens += sum(len(ids) - 1 for ids in rows)
    model.train()
    return nats, tokens


class Trainer:
    """The state of a run (model, optimizers, budget, place in the data), and how to advance, save and restore it."""

    def __init__(self, model, documents, budget: Budget, *, seed, batch, length, learning_rate, weight_decay, bf16):
        self.model, self.budget = model, budget
        self.optimizers = build_optimizers(model, weight_decay)
        self.documents, self.seed, self.batch, self.length = documents, seed, batch, length
        self.learning_rate, self.bf16 = learning_rate, bf16
        self.step, self.epoch, self.next_batch, self.best = 0, 0, 0, float("inf")
        self.batches = epoch_batches(documents, 0, seed, batch, length)

    def train_step(self) -> float:
        """One batch; returns its loss in nats per token."""
        started = time.monotonic()
        if self.next_batch == len(self.batches):
            self.epoch, self.next_batch = self.epoch + 1, 0
            self.batches = epoch_batches(self.documents, self.epoch, self.seed, self.batch, self.length)
        share = self.budget.share
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.learning_rate * min((share + 1e-3) / WARMUP, (1 - share) / (1 - WARMUP))
        ids = torch.from_numpy(self.batches[self.next_batch])
        if share < SHORT_ROWS:
            ids = ids.view(2 * self.batch, self.length // 2)
        loss = loss_of(self.model, ids, self.bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        self.next_batch += 1
        self.step += 1
        self.budget.spend(time.monotonic() - started)
        return loss.item()

    def save(self, path: Path) -> None:
        """Everything that a resumed run needs, in one file that is replaced whole."""
        state = {
            "model": self.model.state_dict(), "optimizers": [o.state_dict() for o in self.optimizers],
            "used": self.budget.used, "step": self.step, "epoch": self.epoch, "next_batch": self.next_batch,
            "best": self.best, "random": torch.get_rng_state(),
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, path)

    def restore(self, path: Path) -> None:
        """Continues where ``save`` left off. Raises FileError when the checkpoint belongs to another shape."""
        try:
            state = torch.load(path, weights_only=True)
            self.model.load_state_dict(state["model"])
            for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
                optimizer.load_state_dict(saved)
        except (RuntimeError, ValueError, KeyError) as error:
            raise FileError(path, f"not a checkpoint of this model ({str(error).splitlines()[0]})") from None
        self.step, self.epoch, self.next_batch = state["step"], state["epoch"], state["next_batch"]
        self.best, self.budget.used = state["best"], state["used"]
        self.batches = epoch_batches(self.documents, self.epoch, self.seed, self.batch, self.length)
        torch.set_rng_state(state["random"])


def train(trainer: Trainer, validation: list, out: Path, save_every: float) -> None:
    """Runs the budget out. Every ``save_every`` seconds and at the end it saves a checkpoint, and writes the model
    to ``out`` when the loss on ``validation`` is the lowest so far."""
    budget, saved_at = trainer.budget, time.monotonic()
    bar = tqdm(total=round(budget.limit), initial=round(budget.used), unit="step" if budget.in_steps else "s",
               desc="training", mininterval=2)
    while budget.share < 1.0:
        loss = trainer.train_step()
        bar.update(min(round(budget.used), bar.total) - bar.n)
        bar.set_postfix(step=trainer.step, epoch=trainer.epoch, loss=f"{loss:.3f}", refresh=False)
        if budget.share < 1.0 and time.monotonic() - saved_at < save_every:
            continue
        nats, tokens = negative_log_likelihood(trainer.model, validation, trainer.batch, trainer.bf16)
        if nats / tokens < trainer.best:
            trainer.best = nats / tokens
            trainer.model.save_pretrained(out)
        trainer.save(out / "checkpoint.pt")
        tqdm.write(f"step {trainer.step} epoch {trainer.epoch} train {loss:.3f} "
                   f"validation {nats / tokens:.4f} best {trainer.best:.4f} nats/token")
        saved_at = time.monotonic()
    bar.close()


def report(out: Path, texts: list[str], vocabulary: sentencepiece.SentencePieceProcessor, batch: int) -> str:
    """Perplexity of the model in ``out``, in float32, on each problem of ``texts`` that its context holds.
    Raises ValueError when it holds none."""
    model = LlamaForCausalLM.from_pretrained(out, dtype=torch.float32)
    fits = [(text, ids) for text, ids in zip(texts, encode(texts, vocabulary), strict=True)
            if len(ids) <= model.config.max_position_embeddings]
    if not fits:
        raise ValueError(f"no test problem fits the context of {model.config.max_position_embeddings} tokens")
    nats, tokens = negative_log_likelihood(model, [ids for _, ids in fits], batch, bf16=False)
    n_bytes = sum(len(text.encode()) for text, _ in fits)
    per_token, per_byte = (torch.tensor(nats / n).exp().item() for n in (tokens, n_bytes))
    return (f"test: {len(fits)} of {len(texts)} problems fit the context; {tokens} tokens, {n_bytes} bytes; "
            f"perplexity {per_token:.3f} per token, {per_byte:.4f} per byte")


@click.command(context_settings={"show_default": True})
@click.option("--data", type=click.Path(path_type=Path), default="../shared/data",
              help="Folder with gsm8k_train.jsonl and gsm8k_test.jsonl.")
@click.option("--out", type=click.Path(path_type=Path), required=True,
              help="Folder to write: config.json, model.safetensors, tokenizer.model, checkpoint.pt.")
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
@click.option("--dropout", type=click.FloatRange(0, 0.9), default=0.1)
@click.option("--precision", type=click.Choice(["bf16", "f32"]), default="bf16", help="Of the products in training.")
@click.option("--seed", type=int, default=2)
def main(data, out, minutes, steps, resume, save_every, vocab_size, dim, hidden_dim, layers, heads, kv_heads, head_dim,
         context, batch, learning_rate, weight_decay, dropout, precision, seed):
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
            vocab_size=vocab_size, hidden_size=dim, intermediate_size=hidden_dim, num_hidden_layers=layers,
            num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=head_dim,
            max_position_embeddings=context, rms_norm_eps=1e-5, tie_word_embeddings=True,
            bos_token_id=vocabulary.bos_id(), eos_token_id=vocabulary.eos_id(),
        )
        model = build_model(config, dropout).train()
        budget = Budget(steps, True) if steps else Budget(60 * minutes, False)
        trainer = Trainer(model, documents, budget, seed=seed, batch=batch, length=context,
                          learning_rate=learning_rate, weight_decay=weight_decay, bf16=precision == "bf16")
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
