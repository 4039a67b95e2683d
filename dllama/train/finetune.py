"""Training a few new parameters of a model that otherwise stays as it is: the loss, the steps, and their state."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm
from transformers import PreTrainedModel

from dllama.errors import FileError
from dllama.train.checkpoint import load_state, save_state
from dllama.train.examples import UNLEARNT, Example, collate, step_rows

CHECKPOINT = "checkpoint.pt"


@dataclass(frozen=True)
class Settings:
    """How to train. A step learns from ``batch * accumulate`` examples, ``batch`` of them at a time in memory.

    warmup: steps in which the learning rate rises; it then falls in a straight line to zero
    clip: largest norm of the gradient
    """

    steps: int
    batch: int
    accumulate: int = 1
    learning_rate: float = 5e-3
    warmup: int = 0
    weight_decay: float = 0.0
    clip: float = 1.0
    seed: int = 0

    def rate(self, step: int) -> float:
        """The learning rate in a step, counted from 0."""
        rising = (step + 1) / (self.warmup + 1)
        falling = (self.steps - step) / max(1, self.steps - self.warmup)
        return self.learning_rate * min(rising, falling)


@dataclass(frozen=True)
class StepReport:
    """loss: nats for each token learnt, before the step;  rate: the learning rate;  norm: of the gradient, unclipped"""

    loss: float
    rate: float
    norm: float


def answers_nats(model: PreTrainedModel, ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Cross entropy in nats, summed over the tokens learnt. ids, labels: int64 [rows, length].

    Rows are filled up at their end, where causal attention does not look; logits are made where they count only.
    """
    states = model.model(input_ids=ids, use_cache=False).last_hidden_state[:, :-1]
    labels = labels[:, 1:]
    counts = labels != UNLEARNT
    return F.cross_entropy(model.lm_head(states[counts]).float(), labels[counts], reduction="sum")


class FineTuning:
    """A run: the model, the parameters that learn, the examples, and the loss of each step that is done.

    identity: what else a checkpoint has to agree in, name -> value
    """

    def __init__(
        self,
        model: PreTrainedModel,
        parameters: Mapping[str, torch.nn.Parameter],
        examples: Sequence[Example],
        settings: Settings,
        identity: Mapping[str, str | int | float] | None = None,
    ):
        self.model, self.parameters, self.examples, self.settings = model, dict(parameters), examples, settings
        self.losses: list[float] = []
        self._identity = asdict(settings) | dict(identity or {})
        self._optimizer = torch.optim.AdamW(
            self.parameters.values(), lr=settings.learning_rate, weight_decay=settings.weight_decay
        )

    @property
    def step(self) -> int:
        """How many steps are done."""
        return len(self.losses)

    @property
    def recent_loss(self) -> float:
        """The mean loss of the last steps, a tenth of all."""
        recent = self.losses[-max(1, self.settings.steps // 10) :]
        return sum(recent) / len(recent)

    def train_step(self) -> StepReport:
        """Learn from the next examples."""
        settings = self.settings
        size = settings.batch * settings.accumulate
        chosen = [self.examples[i] for i in step_rows(len(self.examples), size, self.step, settings.seed)]
        n_tokens = sum(int(example.learnt.sum()) for example in chosen)
        rate = settings.rate(self.step)
        for group in self._optimizer.param_groups:
            group["lr"] = rate
        total = 0.0
        for start in range(0, len(chosen), settings.batch):
            batch = collate(chosen[start : start + settings.batch])
            ids, labels = (torch.from_numpy(array).to(self.model.device) for array in batch)
            loss = answers_nats(self.model, ids, labels) / n_tokens
            loss.backward()
            total += loss.item()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), settings.clip)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        self.losses.append(total)
        return StepReport(total, rate, norm.item())

    def save(self, path: Path) -> None:
        """Everything that a resumed run needs. Raises FileError."""
        trained = {name: parameter.detach() for name, parameter in self.parameters.items()}
        state = {"trained": trained, "optimizer": self._optimizer.state_dict(), "losses": self.losses}
        save_state(path, state | {"identity": self._identity})

    def restore(self, path: Path) -> None:
        """Continue where ``save`` left off. FileError for a checkpoint of another run, naming the difference."""
        state = load_state(path)
        found = state.get("identity")
        if not isinstance(found, dict):
            raise FileError(path, "not a checkpoint of such a training run")
        for name, value in self._identity.items():
            if found.get(name) != value:
                raise FileError(path, f"of a run with {name} {found.get(name)}, and it is {value} now")
        try:
            with torch.no_grad():
                for name, parameter in self.parameters.items():
                    parameter.copy_(state["trained"][name])
            self._optimizer.load_state_dict(state["optimizer"])
            self.losses = list(state["losses"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise FileError(path, f"a damaged checkpoint ({str(error).splitlines()[0]})") from None


def train(run: FineTuning, out: Path, save_every: int) -> None:
    """Take the steps that are left, with a progress bar, and TensorBoard's events in ``out``/tensorboard.

    A checkpoint is saved every ``save_every`` steps and at the end. Raises FileError.
    """
    steps = run.settings.steps
    board = SummaryWriter(str(out / "tensorboard"), purge_step=run.step)
    with board, tqdm(total=steps, initial=run.step, unit="step", desc="training", mininterval=1) as bar:
        while run.step < steps:
            report = run.train_step()
            for name, value in vars(report).items():
                board.add_scalar(name, value, run.step)
            bar.set_postfix(loss=f"{report.loss:.4f}", refresh=False)
            bar.update()
            if run.step % save_every == 0 or run.step == steps:
                run.save(out / CHECKPOINT)
