"""Models as transformers computes them: out of `.m` files, against float64 numpy, and out of folders."""

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="training needs torch: pip install '.[train]'")
pytest.importorskip("transformers", reason="training needs transformers: pip install '.[train]'")

from dllama.errors import FileError, ModelError  # noqa: E402
from dllama.train.base_model import load_base, model_of_file  # noqa: E402
from tests.engine.checkpoints import build  # noqa: E402
from tests.engine.models import SHAPES, random_model  # noqa: E402
from tests.engine.reference import logits  # noqa: E402
from tests.formats.models import QWEN3_MOE, config, write_random  # noqa: E402
from tests.tokenizer.models import train as train_tokenizer  # noqa: E402


@pytest.mark.parametrize("name", [name for name in SHAPES if "moe" not in name])
def test_a_model_file_is_the_same_model_in_transformers(tmp_path, name):
    ids = np.random.default_rng(0).integers(0, 60, 30).tolist()
    with random_model(tmp_path / "a.m", SHAPES[name]) as file:
        expected = logits(file, ids)
        with torch.no_grad():
            found = model_of_file(file, torch.float32)(torch.tensor([ids])).logits[0].numpy()
    assert np.linalg.norm(found - expected) < 1e-5 * np.linalg.norm(expected)


def test_the_embedded_model():
    base = load_base(None, None, torch.bfloat16)
    assert base.tokenizer.vocab_size == base.model.config.vocab_size and base.context == 512
    assert {p.dtype for p in base.model.parameters()} == {torch.bfloat16}
    assert not any(p.requires_grad for p in base.model.parameters()) and not base.model.training


def test_a_folder_with_a_tokenizer_file(tmp_path):
    folder = build("gqa", tmp_path / "folder")
    tokenizer = train_tokenizer(tmp_path / "tokenizer.model", vocab_size=400)
    with pytest.raises(ModelError, match="folder: the tokenizer has 400 tokens and the model 50"):
        load_base(folder, tokenizer, torch.float32)
    with pytest.raises(FileError, match="folder: holds no tokenizer that can be read"):
        load_base(folder, None, torch.float32)


def test_a_mixture_of_experts_in_a_file_is_refused(tmp_path):
    write_random(tmp_path / "a.m", config(QWEN3_MOE))
    with pytest.raises(ModelError, match="a.m: a mixture of experts is trained from its Hugging Face folder only"):
        load_base(tmp_path / "a.m", train_tokenizer(tmp_path / "tokenizer.model"), torch.float32)


@pytest.mark.parametrize(
    "name, error, said",
    [
        ("folder", FileError, "folder: cannot be loaded by transformers"),
        ("none.m", FileError, "none.m: no such file"),
        ("text.m", FileError, "text.m: "),
    ],
)
def test_paths_that_are_no_models(tmp_path, name, error, said):
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.m").write_text("no model")
    with pytest.raises(error, match=said):
        load_base(tmp_path / name, tmp_path / "tokenizer.model", torch.float32)


def test_a_model_file_needs_its_tokenizer(tmp_path):
    with pytest.raises(ModelError, match="--model FILE.m and --tokenizer come together"):
        load_base(tmp_path / "a.m", None, torch.float32)
