"""The training script from end to end, on a few problems made up here; and the text that it trains on."""

import json
import math
import re

import numpy as np
import pytest

from dllama.errors import FileError
from dllama.train import corpus

NAMES = ["Ada", "Ben", "Cleo", "Dan", "Eve", "Finn", "Gus", "Hana"]
THINGS = ["apples", "books", "coins", "stamps", "pencils", "marbles"]


def made_up_problems(n, seed):
    """``n`` problems in GSM8K's form, about names and numbers that ``seed`` chooses."""
    random = np.random.default_rng(seed)
    problems = []
    for _ in range(n):
        name, thing = random.choice(NAMES), random.choice(THINGS)
        a, b = (int(x) for x in random.integers(2, 99, 2))
        problems.append(
            {
                "question": f"{name} has {a} {thing} and buys {b} more. How many {thing} does {name} have?",
                "answer": f"{name} has {a}+{b} = <<{a}+{b}={a + b}>>{a + b} {thing}.\n#### {a + b}",
            }
        )
    return problems


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    for name, n, seed in (("train", 80, 1), ("test", 10, 2)):
        lines = [json.dumps(problem) for problem in made_up_problems(n, seed)]
        (folder / f"gsm8k_{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


def test_plain_text_drops_the_calculators_notes_and_typographic_signs():
    text = corpus.plain_text("Ann’s  cat\neats 2 − 1 fish?", "It eats 2-1 = <<2-1=1>>1 fish. \n#### 1")
    assert text == "Question: Ann's cat\neats 2 - 1 fish?\nAnswer: It eats 2-1 = 1 fish.\n#### 1"


@pytest.mark.parametrize("content", ["not json", '{"question": "?"}', "[1]", '{"question": "2", "answer": 1}', "\n"])
def test_a_file_that_holds_no_problems_is_refused_by_name(tmp_path, content):
    path = tmp_path / "gsm8k_train.jsonl"
    path.write_text(content)
    with pytest.raises(FileError, match="gsm8k_train.jsonl"):
        corpus.read_problems(path)


def test_a_missing_file_is_refused_by_name(tmp_path):
    with pytest.raises(FileError, match="nowhere.jsonl: No such file"):
        corpus.read_problems(tmp_path / "nowhere.jsonl")


def test_the_vocabulary_brings_any_text_back(data, tmp_path):
    import sentencepiece

    texts = corpus.read_problems(data / "gsm8k_train.jsonl")
    vocabulary = sentencepiece.SentencePieceProcessor(model_proto=corpus.train_vocabulary(texts, 320))
    assert vocabulary.vocab_size() == 320
    for text in (*texts[:5], "Zoë pays 1024 €:\n\n  ½ × 2"):
        assert vocabulary.decode(vocabulary.encode(text)) == text
    assert [piece.strip("▁") for piece in vocabulary.encode("1024", out_type=str)][-4:] == list("1024")
    first, *_, last = corpus.encode(texts[:1], vocabulary)[0]
    assert (first, last) == (vocabulary.bos_id(), vocabulary.eos_id())


def test_an_epoch_holds_the_documents_once_in_an_order_of_its_own():
    documents = [np.arange(start, start + 10) for start in range(0, 1000, 10)]
    first = corpus.epoch_batches(documents, epoch=0, seed=1, batch=2, length=16)
    assert first.shape == (31, 2, 16) and len(np.unique(first)) == first.size
    assert np.array_equal(first, corpus.epoch_batches(documents, epoch=0, seed=1, batch=2, length=16))
    assert not np.array_equal(first, corpus.epoch_batches(documents, epoch=1, seed=1, batch=2, length=16))
    with pytest.raises(ValueError, match="do not fill one batch"):
        corpus.epoch_batches(documents, epoch=0, seed=1, batch=64, length=16)


def run_script(data, out, *options):
    """Runs the real script on a tiny shape; returns click's result."""
    pytest.importorskip("torch", reason="training needs torch: pip install '.[train]'")
    pytest.importorskip("transformers", reason="training needs transformers: pip install '.[train]'")
    from click.testing import CliRunner

    from dllama.train.embedded import main

    shape = [
        "--vocab-size",
        "320",
        "--dim",
        "32",
        "--hidden-dim",
        "64",
        "--layers",
        "1",
        "--heads",
        "4",
        "--kv-heads",
        "2",
        "--head-dim",
        "8",
        "--context",
        "128",
        "--batch",
        "2",
        "--precision",
        "f32",
    ]
    return CliRunner().invoke(main, ["--data", str(data), "--out", str(out), *shape, *options])


def test_training_lowers_the_loss_and_writes_a_model_that_loads(data, tmp_path):
    result = run_script(data, tmp_path, "--steps", "40", "--save-every", "0", "--learning-rate", "0.02")
    assert result.exit_code == 0, result.output
    losses = [float(loss) for loss in re.findall(r"validation ([\d.]+)", result.output)]
    assert len(losses) == 40 and losses[0] > 5.0 and losses[-1] < 3.0  # ln 320 = 5.77 knows nothing

    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(tmp_path)
    assert model.config.head_dim == 8 and model.config.num_key_value_heads == 2
    assert torch.isfinite(model(torch.arange(1, 30)[None]).logits).all()
    assert (tmp_path / "tokenizer.model").stat().st_size > 1000
    report = re.search(r"(\d+) tokens, (\d+) bytes; perplexity ([\d.]+) per token, ([\d.]+) per byte", result.output)
    tokens, n_bytes, per_token, per_byte = (float(x) for x in report.groups())
    assert math.log(per_token) * tokens == pytest.approx(math.log(per_byte) * n_bytes, rel=1e-2)


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(data, tmp_path, monkeypatch):
    """Interrupted after 5 of 10 steps, then taken up again from the checkpoint."""
    pytest.importorskip("torch", reason="training needs torch: pip install '.[train]'")
    import torch

    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert run_script(data, whole, "--steps", "10").exit_code == 0
    from dllama.train import embedded

    original = embedded.Trainer.train_step

    def stop_after_five(trainer):
        if trainer.step == 5:
            raise KeyboardInterrupt
        return original(trainer)

    monkeypatch.setattr(embedded.Trainer, "train_step", stop_after_five)
    assert run_script(data, halves, "--steps", "10", "--save-every", "0").exit_code == 1
    monkeypatch.undo()
    assert run_script(data, halves, "--steps", "10", "--resume").exit_code == 0
    for name in ("model", "used", "step", "epoch", "next_batch"):
        first, second = (torch.load(folder / "checkpoint.pt")[name] for folder in (whole, halves))
        if name == "model":
            assert all(torch.equal(first[key], second[key]) for key in first)
        else:
            assert first == second


@pytest.mark.parametrize(
    "options, said",
    [
        (["--heads", "3"], "--heads must be a multiple"),
        (["--resume"], "checkpoint.pt: no such file"),
        (["--vocab-size", "32000"], "no vocabulary of 32000 pieces"),
        (["--context", "8"], "no test problem fits"),
        (["--batch", "4096"], "do not fill one batch"),
        (["--data", "nowhere"], "nowhere/gsm8k_train.jsonl: No such file"),
    ],
)
def test_a_mistake_is_one_line(data, tmp_path, options, said):
    result = run_script(data, tmp_path, "--steps", "2", *options)
    assert result.exit_code in (1, 2) and said in result.output and "Traceback" not in result.output
    assert isinstance(result.exception, SystemExit)
