"""`dllama imatrix` on the embedded model."""

import numpy as np
import pytest

from dllama.cluster.digest import model_digest
from dllama.formats import ModelFile, tensor_layout
from dllama.formats.imatrix import read_imatrix
from tests.cli.program import dllama, fails, succeeds

TEXT = "Question: Tom has 3 apples. He buys 4 more apples at the market. How many apples does Tom have now?\n"


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(5 * TEXT)
    return path


def test_every_matrix_of_the_embedded_model(tmp_path, text, embedded):
    out = tmp_path / "embedded.imatrix"
    line = succeeds("imatrix", "--file", text, "-o", out, "--nthreads", 1)
    with ModelFile(embedded.model) as model:
        matrix = read_imatrix(out, tensor_layout(model.config))
        assert matrix.digest == model_digest(model).hex()
    assert line == f"{out}: {len(matrix.means)} matrices of model.m, over {matrix.tokens} tokens\n"
    assert len(matrix.means) == 7 * model.config.n_layers + 1
    assert all(means.any() for means in matrix.means.values())

    # The same text gives the same bytes.
    again = tmp_path / "again.imatrix"
    succeeds("imatrix", "--file", "-", "-o", again, "--nthreads", 1, stdin=text.read_bytes())
    assert again.read_bytes() == out.read_bytes()
    succeeds("imatrix", "--file", text, "-o", again, "--context", 16, "--force")
    short = read_imatrix(again)
    assert short.tokens > matrix.tokens  # every window begins with the bos token
    assert not np.array_equal(short.means["w2", 1], matrix.means["w2", 1])


def test_outputs_that_cannot_be_written(tmp_path, text):
    assert fails("imatrix", "--file", text, "-o", text).endswith("exists already (--force replaces it)")
    assert "no such file or folder" in fails("imatrix", "--file", text, "-o", tmp_path / "none" / "out")
    assert [path.name for path in tmp_path.iterdir()] == [text.name]


def test_inputs_that_make_no_sense(tmp_path, text, small_model, embedded):
    out = tmp_path / "out"
    assert fails("imatrix", "--file", tmp_path / "none", "-o", out).endswith("none: no such file or folder")
    assert fails("imatrix", "--file", "-", "-o", out) == "-: no text to record"
    assert "come together" in fails("imatrix", "--file", text, "-o", out, "--model", embedded.model, status=2)
    other = "--model", small_model, "--tokenizer", embedded.tokenizer
    assert "do not belong together" in fails("imatrix", "--file", text, "-o", out, *other)
    assert "beyond the model's own, 512" in fails("imatrix", "--file", text, "-o", out, "--context", 513)
    assert not out.exists()


def test_memory_that_does_not_suffice(tmp_path, text):
    result = dllama("imatrix", "--file", text, "-o", tmp_path / "out", DLLAMA_MEMORY_LIMIT="1000000")
    assert result.returncode == 1 and "of memory needed for a context of" in result.stderr
