"""A training run of a small LLaMA on a CPU: the optimizers and their schedule, checkpoints, and the loss."""

import time
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm
from transformers import LlamaForCausalLM

from dllama.errors import FileError
from dllama.formats import FloatType, dequantize, quantize
from dllama.train.checkpoint import load_state, save_state
from dllama.train.corpus import epoch_batches

# Shares of the budget:
WARMUP = 0.02  # in which the learning rate rises; it then falls in a straight line to zero
SHORT_ROWS = 0.7  # in which rows are half a context long, because attention to short rows costs less
EXACT_WEIGHTS = 0.8  # in which the loss is that of exact weights; then, of the weights as Q40 stores them
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


def build_optimizers(model: LlamaForCausalLM, weight_decay: float) -> list[torch.optim.Optimizer]:
    """Muon (https://kellerjordan.github.io/posts/muon) for the matrices of the layers, AdamW for all else.

    Muon's updates are scaled to the size of AdamW's, so that one learning rate serves both.
    """
    matrices = [p for p in model.model.layers.parameters() if p.ndim == 2]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    return [
        torch.optim.Muon(matrices, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=(0.9, 0.95), weight_decay=0.0),
    ]


@contextmanager
def stored_as_q40(model: LlamaForCausalLM):
    """For the length of a with block, the matrices have the values that Q40 blocks would give back.

    Gradients taken inside are then used to move the exact weights (the straight-through estimator,
    https://arxiv.org/abs/1511.00363), which so come to rest where rounding them costs little.
    """
    exact = [(p, p.data) for p in model.parameters() if p.ndim == 2]
    for parameter, data in exact:
        blocks = quantize(data.numpy(), FloatType.Q40)
        parameter.data = torch.from_numpy(dequantize(blocks, FloatType.Q40, data.shape[1]))
    try:
        yield
    finally:
        for parameter, data in exact:
            parameter.data = data


def loss_of(model: LlamaForCausalLM, ids: torch.Tensor, bf16: bool, reduction: str = "mean") -> torch.Tensor:
    """Cross entropy in nats of each next token of ``ids`` (int64 [rows, length]); ids below 0 are padding."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=ids[:, :-1].clamp(min=0), use_cache=False).logits
    return F.cross_entropy(logits.float().flatten(0, 1), ids[:, 1:].flatten(), ignore_index=-1, reduction=reduction)


@torch.no_grad()
def negative_log_likelihood(
    model: LlamaForCausalLM, documents: list[np.ndarray], batch: int, bf16: bool
) -> tuple[float, int]:
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
        with stored_as_q40(self.model) if share >= EXACT_WEIGHTS else nullcontext():
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
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
            "used": self.budget.used,
            "step": self.step,
            "epoch": self.epoch,
            "next_batch": self.next_batch,
            "best": self.best,
            "random": torch.get_rng_state(),
        }
        save_state(path, state)

    def restore(self, path: Path) -> None:
        """Continues where ``save`` left off. Raises FileError when the checkpoint belongs to another shape."""
        state = load_state(path)
        try:
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
    bar = tqdm(
        total=round(budget.limit),
        initial=round(budget.used),
        unit="step" if budget.in_steps else "s",
        desc="training",
        mininterval=2,
    )
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
        tqdm.write(
            f"step {trainer.step} epoch {trainer.epoch} train {loss:.3f} "
            f"validation {nats / tokens:.4f} best {trainer.best:.4f} nats/token"
        )
        saved_at = time.monotonic()
    bar.close()
