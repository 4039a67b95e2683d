"""`dllama train privatelora` from end to end: model and data in, adapter out."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel

from dllama.errors import ModelError
from dllama.formats.files import open_regular
from dllama.lora import write_lora
from dllama.privatelora.adapter import CloudAdapter, write_adapter
from dllama.privatelora.shape import AdapterShape, Place
from dllama.train.adapters import add_lora, add_private_lora, edge_adapter, lora_adapter, shape_for
from dllama.train.base_model import load_base
from dllama.train.examples import read_examples, steps_of_epoch
from dllama.train.finetune import CHECKPOINT, FineTuning, Settings, train

FLOAT_TYPES = {"f16": np.float16, "f32": np.float32}


@dataclass(frozen=True)
class Job:
    """What to train, on what, and how; the command's options, whose help says more.

    model, tokenizer: None for the embedded model's;  layers: None for all
    rank_back: r_d2c, None where it is r_c2d, which ``rank`` is;  lora: an ordinary LoRA of that rank in its place
    alpha: of the LoRA, None for twice its rank;  steps: in place of ``epochs``, where given
    """

    model: Path | None
    tokenizer: Path | None
    data: Path
    output: Path
    lora: bool
    rank: int
    rank_back: int | None
    alpha: float | None
    targets: tuple[str, ...]
    layers: range | None
    lr: float
    epochs: float
    steps: int | None
    warmup: int
    batch: int
    accumulate: int
    clip: float
    weight_decay: float
    context: int | None
    bf16: bool
    device: str
    seed: int
    float_type: str
    save_every: int
    resume: bool


def run_job(job: Job, notify: Callable[[str], None]) -> str:
    """Train, and write the adapter into ``job.output``; a line about it. ``notify`` gets lines on the way.

    Raises FileError (FormatError) and ModelError for what cannot be used, naming it.
    """
    device = _device(job.device)
    base = load_base(job.model, job.tokenizer, torch.bfloat16 if job.bf16 else torch.float32)
    context = min(job.context or base.context, base.context)
    examples, too_long = read_examples(job.data, base.tokenizer, context)
    if too_long:
        notify(f"{job.data}: {too_long:,} examples are longer than {context} tokens and left out")
    base.model.to(device)
    shape = shape_for(base.model, job.rank, job.rank_back or job.rank, job.targets, job.layers)
    add = _add_lora if job.lora else _add_private_lora
    modules, write = add(job, base.model, shape, base.name)

    size = job.batch * job.accumulate
    steps = job.steps or max(1, round(job.epochs * steps_of_epoch(len(examples), size)))
    settings = Settings(steps, job.batch, job.accumulate, job.lr, job.warmup, job.weight_decay, job.clip, job.seed)
    run = FineTuning(base.model, _trained(modules), examples, settings, _identity(job, shape))
    if job.resume:
        run.restore(job.output / CHECKPOINT)
    n_trained = sum(parameter.numel() for parameter in run.parameters.values())
    notify(f"{len(examples):,} examples, {steps:,} steps of {size}, {n_trained:,} parameters to train, on {device}")
    train(run, job.output, job.save_every)
    write()
    return (
        f"{job.output}: {'LoRA' if job.lora else 'PrivateLoRA'} for {', '.join(job.targets)} of "
        f"{len(shape.layers)} layers of {base.name}, loss {run.recent_loss:.4f} nats per token of the answers"
    )


def _device(name: str) -> str:
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: torch finds no GPU here (--device cpu trains without)")
    return name


Added = tuple[dict[Place, nn.Module], Callable[[], None]]
"""The modules put into the model, and what writes them down when they are trained."""


def _add_private_lora(job: Job, model: PreTrainedModel, shape: AdapterShape, base: str) -> Added:
    cloud = CloudAdapter(shape, job.seed)
    modules = add_private_lora(model, cloud)
    dtype = FLOAT_TYPES[job.float_type]
    return modules, lambda: write_adapter(job.output, cloud, edge_adapter(modules, cloud, dtype))


def _add_lora(job: Job, model: PreTrainedModel, shape: AdapterShape, base: str) -> Added:
    alpha = _alpha(job)
    modules = add_lora(model, shape, alpha, job.seed)
    return modules, lambda: write_lora(job.output, lora_adapter(modules, alpha), base)


def _alpha(job: Job) -> float:
    return job.alpha or 2.0 * job.rank


def _trained(modules: dict[Place, nn.Module]) -> dict[str, nn.Parameter]:
    """What learns, by name."""
    return {
        f"layers.{layer}.{target}.{name}": parameter
        for (layer, target), module in modules.items()
        for name, parameter in module.named_parameters()
        if parameter.requires_grad
    }


def _identity(job: Job, shape: AdapterShape) -> dict[str, str | bool]:
    """What a checkpoint has to agree in, besides the settings."""
    adapter = shape.to_metadata() | ({"alpha": _alpha(job)} if job.lora else {})
    return {"adapter": json.dumps(adapter, sort_keys=True), "data": _digest(job.data), "bf16": job.bf16}


def _digest(path: Path) -> str:
    with open_regular(path) as file:
        return hashlib.sha256(file.read()).hexdigest()
