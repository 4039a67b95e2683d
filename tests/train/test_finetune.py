"""Training against a loop written by hand in torch, and a resumed run against one that was never interrupted."""

import math

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch: pip install '.[train]'")
pytest.importorskip("transformers", reason="training needs transformers: pip install '.[train]'")
pytest.importorskip("tensorboard", reason="training needs tensorboard: pip install '.[train]'")

from dllama.errors import FileError  # noqa: E402
from dllama.privatelora.adapter import CloudAdapter  # noqa: E402
from dllama.privatelora.frozen import frozen_matrix  # noqa: E402
from dllama.train.adapters import add_lora, add_private_lora, shape_for  # noqa: E402
from dllama.train.finetune import CHECKPOINT, FineTuning, Settings, train  # noqa: E402
from tests.train.models import random_examples, tiny_model  # noqa: E402

SEED, RANK, TARGETS = 3, 8, ("q", "k", "v")
EXAMPLES = random_examples(10)
SETTINGS = Settings(
    steps=24, batch=2, accumulate=2, learning_rate=1.0, warmup=4, weight_decay=0.1, clip=0.022, seed=SEED
)


def private_run(folder, settings=SETTINGS, examples=EXAMPLES) -> FineTuning:
    model = tiny_model(folder / "model")
    modules = add_private_lora(model, CloudAdapter(shape_for(model, RANK, RANK, TARGETS), SEED))
    return FineTuning(model, {f"{layer}.{target}": m.m for (layer, target), m in modules.items()}, examples, settings)


def losses_by_hand(folder) -> list[float]:
    """The same training, but for: hooks that add B·M·A·x, logits of every token, no batches within a step, the clipping
    and AdamW (Loshchilov and Hutter, 2019, algorithm 2) spelled out."""
    model = tiny_model(folder / "model")
    state = []  # M, and the two moments
    for layer, block in enumerate(model.model.layers):
        for target in TARGETS:
            linear = getattr(block.self_attn, f"{target}_proj")
            a = torch.from_numpy(frozen_matrix(SEED, layer, target, "A", (RANK, linear.in_features)))
            b = torch.from_numpy(frozen_matrix(SEED, layer, target, "B", (linear.out_features, RANK)))
            m = torch.zeros(RANK, RANK, requires_grad=True)
            linear.register_forward_hook(lambda _, x, out, a=a, b=b, m=m: out + x[0] @ (b @ m @ a).T)
            state.append((m, torch.zeros_like(m), torch.zeros_like(m)))
    losses, s = [], SETTINGS
    for step in range(s.steps):
        epoch, index = divmod(step, math.ceil(len(EXAMPLES) / 4))
        order = np.random.default_rng((SEED, epoch)).permutation(len(EXAMPLES))[4 * index : 4 * index + 4]
        nats, count = 0.0, 0
        for i in order:  # one example at a time, so nothing is filled up
            ids = torch.from_numpy(EXAMPLES[i].ids)
            chances = model(ids[None]).logits[0].log_softmax(-1)
            for place in np.flatnonzero(EXAMPLES[i].learnt):
                nats -= chances[place - 1, ids[place]]
                count += 1
        loss = nats / count
        gradients = torch.autograd.grad(loss, [m for m, _, _ in state])
        norm = math.sqrt(sum(float((g**2).sum()) for g in gradients))
        rate = s.learning_rate * (
            (step + 1) / (s.warmup + 1) if step < s.warmup else (s.steps - step) / (s.steps - s.warmup)
        )
        with torch.no_grad():
            for (m, first, second), gradient in zip(state, gradients, strict=True):
                gradient = gradient * min(1, s.clip / norm)
                first.mul_(0.9).add_(0.1 * gradient)
                second.mul_(0.999).add_(0.001 * gradient**2)
                m.mul_(1 - rate * s.weight_decay)
                mean, spread = first / (1 - 0.9 ** (step + 1)), second / (1 - 0.999 ** (step + 1))
                m.sub_(rate * mean / (spread.sqrt() + 1e-8))
        losses.append(loss.item())
    return losses


def test_the_loss_curve_is_that_of_a_loop_written_by_hand(tmp_path):
    run = private_run(tmp_path)
    reports = [run.train_step() for _ in range(SETTINGS.steps)]
    assert 0 < sum(report.norm > SETTINGS.clip for report in reports) < SETTINGS.steps
    np.testing.assert_allclose(run.losses, losses_by_hand(tmp_path), atol=1e-4)


def test_the_rate_rises_and_falls():
    rates = [SETTINGS.rate(step) / SETTINGS.learning_rate for step in range(SETTINGS.steps)]
    np.testing.assert_allclose(rates[:5], [0.2, 0.4, 0.6, 0.8, 1.0])
    np.testing.assert_allclose(np.diff(rates[4:]), -0.05)
    assert rates[-1] > 0


def test_random_answers_are_learnt_by_heart(tmp_path):
    settings = Settings(steps=100, batch=4, learning_rate=3.0, seed=SEED)
    run = private_run(tmp_path, settings, random_examples(4))
    train(run, tmp_path, save_every=1000)
    assert run.losses[0] > 3.0 and run.recent_loss < 0.5  # ln 50 = 3.9 knows nothing


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(tmp_path):
    whole, half, resumed = (private_run(tmp_path) for _ in range(3))
    for _ in range(SETTINGS.steps):
        whole.train_step()
    for _ in range(SETTINGS.steps // 2):
        half.train_step()
    half.save(tmp_path / CHECKPOINT)
    resumed.restore(tmp_path / CHECKPOINT)
    train(resumed, tmp_path, save_every=5)
    assert resumed.losses == whole.losses
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, resumed.parameters[name])
    again = private_run(tmp_path)
    again.restore(tmp_path / CHECKPOINT)
    train(again, tmp_path, save_every=5)  # nothing is left to do
    assert again.losses == whole.losses


def test_tensorboard_is_told_every_step(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = private_run(tmp_path)
    train(run, tmp_path, save_every=1000)
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert set(events.Tags()["scalars"]) == {"loss", "rate", "norm"}
    np.testing.assert_allclose([event.value for event in events.Scalars("loss")], run.losses, rtol=1e-6)


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    run = private_run(tmp_path)
    run.save(tmp_path / CHECKPOINT)
    other = private_run(tmp_path, Settings(**{**vars(SETTINGS), "batch": 3}))
    with pytest.raises(FileError, match="checkpoint.pt: of a run with batch 2, and it is 3 now"):
        other.restore(tmp_path / CHECKPOINT)
    with pytest.raises(FileError, match="none.pt: no such file"):
        run.restore(tmp_path / "none.pt")
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(FileError, match="text.pt: not a checkpoint"):
        run.restore(tmp_path / "text.pt")
    torch.save([1], tmp_path / "list.pt")
    with pytest.raises(FileError, match="list.pt: not a checkpoint of a training run"):
        run.restore(tmp_path / "list.pt")


def test_a_lora_learns_too(tmp_path):
    model = tiny_model(tmp_path / "model")
    modules = add_lora(model, shape_for(model, RANK, RANK, TARGETS), alpha=16.0, seed=SEED)
    parameters = {f"{place}.{name}": getattr(module, name) for place, module in modules.items() for name in "ab"}
    run = FineTuning(model, parameters, random_examples(4), Settings(steps=40, batch=4, learning_rate=0.03))
    train(run, tmp_path, save_every=1000)
    assert run.losses[0] > 3.0 and run.recent_loss < 0.5
