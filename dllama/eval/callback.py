"""Tasks of lm-evaluation-harness on a model while transformers' ``Trainer`` trains it."""

from collections.abc import Iterable
from copy import deepcopy
from typing import Any

import torch
from lm_eval import evaluate
from lm_eval.api.task import Task
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainerControl

from dllama.eval import TASKS

FEWSHOT_SEED = 1234
"""The harness's default; every evaluation shows the same examples."""


class EvalHarnessCallBack(TrainerCallback):
    """Evaluates the trainer's model on some tasks, and logs "eval_TASK_METRIC" for each of their measures.

    trainer: whose log takes the results; ``trainer.add_callback`` takes this object
    tokenizer: the model's; the trainer's own is left as it is
    tasks: names of tasks, of this package or of the harness, paths of task files, or tasks loaded before, such as
        ``TaskManager(include_path=TASKS, metadata={"data": "test.jsonl"}).load(["gsm8k_file"])["tasks"].values()``
    eval_steps: steps from one evaluation to the next; None for a single one, after training
    eval_start: the first step that may be evaluated
    do_init_eval: also evaluate the model before the first step
    eval_batch_size: requests at a time

    The state of torch's random generators, and whether modules are in training, are as before afterwards. In training
    over several processes each of them evaluates all. Raises what the harness does for tasks that cannot be loaded.
    """

    def __init__(
        self,
        trainer: Trainer,
        tokenizer: PreTrainedTokenizerBase,
        tasks: Iterable[str | Task],
        eval_steps: int | None = None,
        eval_start: int = 0,
        do_init_eval: bool = False,
        eval_batch_size: int = 32,
    ):
        self.trainer = trainer
        self.tokenizer = deepcopy(tokenizer)  # the harness gives it a padding token
        tasks = list(tasks)
        by_name = any(isinstance(task, str) for task in tasks)
        self.tasks = TaskManager(include_path=TASKS, include_defaults=by_name).load(tasks)
        for task in self.tasks["tasks"].values():
            if task.get_config("num_fewshot") is None:
                task.set_config("num_fewshot", 0)
        self.eval_steps, self.eval_start = eval_steps, eval_start
        self.do_init_eval, self.eval_batch_size = do_init_eval, eval_batch_size

    def on_train_begin(self, args, state, control, model, **kwargs) -> None:
        if self.do_init_eval:
            self.evaluate(model, control)

    def on_step_end(self, args, state, control, model, **kwargs) -> None:
        if self.eval_steps and state.global_step >= self.eval_start and state.global_step % self.eval_steps == 0:
            self.evaluate(model, control)

    def on_train_end(self, args, state, control, model, **kwargs) -> None:
        if not self.eval_steps:
            self.evaluate(model, control)

    def evaluate(self, model: torch.nn.Module, control: TrainerControl) -> None:
        """Runs the tasks on the model and logs what comes out; what the trainer is about to do stays as it is."""
        for task in self.tasks["tasks"].values():
            task.set_fewshot_seed(FEWSHOT_SEED)
        in_training = [module for module in model.modules() if module.training]
        with torch.random.fork_rng():
            lm = HFLM(
                self.trainer.accelerator.unwrap_model(model),
                tokenizer=self.tokenizer,
                batch_size=self.eval_batch_size,
                max_batch_size=self.eval_batch_size,
            )
            try:
                results = evaluate(lm, self.tasks, bootstrap_iters=0, log_samples=False)
            finally:
                for module in in_training:
                    module.training = True
        if results:  # in the first process
            should_log = control.should_log  # the loss of this step
            self.trainer.log(_measures(results["results"]))
            control.should_log = should_log


def _measures(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The harness's results, "acc,none" and so on, under names for a log; no standard errors and sample counts."""
    return {
        f"eval_{task}_{measure.removesuffix(',none').replace(',', '_')}": float(value)
        for task, measures in results.items()
        for measure, value in measures.items()
        if "," in measure and "_stderr," not in measure and isinstance(value, int | float)
    }
