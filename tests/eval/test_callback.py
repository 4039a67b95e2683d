"""The callback in a run of transformers' ``Trainer`` on the CPU."""

import pytest

pytest.importorskip("lm_eval", reason="the harness: pip install '.[eval]'")
torch = pytest.importorskip("torch", reason="training needs torch: pip install '.[eval]'")
pytest.importorskip("accelerate", reason="the Trainer needs it: pip install '.[eval]'")

from lm_eval.tasks import TaskManager  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments  # noqa: E402

from dllama.eval import TASKS  # noqa: E402
from dllama.eval.callback import EvalHarnessCallBack  # noqa: E402

MEASURES = {"eval_gsm8k_file_exact_match_strict-match", "eval_gsm8k_file_exact_match_flexible-extract"}


def train(checkpoint, folder, add_callback) -> Trainer:
    """Six steps; ``add_callback`` gets the trainer and its tokenizer before."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, attention_dropout=0.5)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    ids = torch.randint(0, 256, (12, 20), generator=torch.Generator().manual_seed(0))
    arguments = TrainingArguments(
        str(folder), max_steps=6, per_device_train_batch_size=2, logging_steps=1, report_to=[], use_cpu=True,
        save_strategy="no", disable_tqdm=True, seed=1,
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in ids]
    trainer = Trainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    add_callback(trainer, tokenizer)
    trainer.train()
    return trainer


def steps_with(trainer, name: str) -> list[int]:
    return [entry["step"] for entry in trainer.state.log_history if name in entry]


@pytest.mark.parametrize(
    "settings, steps",
    [
        ({"eval_steps": 2}, [2, 4, 6]),
        ({"eval_steps": 2, "eval_start": 3, "do_init_eval": True}, [0, 4, 6]),
        ({}, [6]),
    ],
)
def test_results_are_logged_and_training_goes_on_as_without(checkpoint, problems, tmp_path, settings, steps):
    manager = TaskManager(include_path=TASKS, include_defaults=False, metadata={"data": str(problems)})
    task = manager.load(["gsm8k_file"])["tasks"]["gsm8k_file"]
    task.set_config("generation_kwargs", {"max_gen_toks": 8}, update=True)
    flags = []

    def add(trainer, tokenizer):
        callback = EvalHarnessCallBack(trainer, tokenizer, [task], eval_batch_size=2, **settings)
        trainer.add_callback(callback)
        callback.on_log = lambda args, state, control, model, **_: flags.append((state.global_step, model.training))

    evaluated = train(checkpoint, tmp_path, add)
    plain = train(checkpoint, tmp_path, lambda trainer, tokenizer: None)
    for measure in MEASURES:
        assert steps_with(evaluated, measure) == steps
        assert all(0 <= entry[measure] <= 1 for entry in evaluated.state.log_history if measure in entry)
    losses = [[entry["loss"] for entry in each.state.log_history if "loss" in entry] for each in (evaluated, plain)]
    assert len(losses[0]) == 6 and losses[0] == losses[1]
    assert flags and all(training for step, training in flags if step)  # before the first step there is none


def test_a_task_that_does_not_exist(checkpoint, tmp_path):
    def add(trainer, tokenizer):
        EvalHarnessCallBack(trainer, tokenizer, ["no_such_task"])

    with pytest.raises(KeyError, match="no_such_task"):
        train(checkpoint, tmp_path, add)
