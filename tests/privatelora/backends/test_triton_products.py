"""Triton's products against float64: on the GPU, or by Triton's interpreter where there is none."""

import itertools
import os
import subprocess
import sys

import numpy as np
import pytest

from dllama.formats.blocks import FloatType, dequantize, quantize

torch = pytest.importorskip("torch", reason="needs torch")
triton = pytest.importorskip("triton", reason="needs triton")

from dllama.privatelora.backends.torch.triton_products import product  # noqa: E402
from dllama.privatelora.backends.torch.weights import PACKED, Scratch  # noqa: E402

ON_GPU = torch.cuda.is_available()
INTERPRETED = triton.knobs.runtime.interpret


@pytest.mark.skipif(ON_GPU or INTERPRETED, reason="the tests below can run")
def test_by_the_interpreter():
    """It has to be asked for before Triton is imported."""
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    run = subprocess.run(command, env={**os.environ, "TRITON_INTERPRET": "1"}, capture_output=True, text=True)
    assert run.returncode == 0 and " passed" in run.stdout, run.stdout


SHAPES = [(37, 96), (5, 2112), (130, 320)] + [(12288, 4096), (4096, 11008)] * ON_GPU
CASES = list(itertools.product(PACKED, SHAPES, [1, 2, 3, 8, 9, 33, 128])) if ON_GPU or INTERPRETED else []


@pytest.mark.parametrize("form, shape, n", CASES)
def test_rows_that_share_a_matrix(form, shape, n):
    rows, columns = shape
    device = torch.device("cuda" if ON_GPU else "cpu")
    random = np.random.default_rng(rows + n)
    raw = quantize(random.standard_normal((rows, columns), np.float32), form)
    x = torch.from_numpy(random.standard_normal((n, columns), np.float32)).to(device, torch.float16)
    matrix = PACKED[form](rows, columns, Scratch(torch.float16, device), device)
    matrix.fill(0, raw, form)
    guarded = torch.full((n + 2, rows), 7, dtype=torch.float16, device=device)
    product(x, matrix._integers, matrix._scales, guarded[1:-1])

    expected = x.cpu().double().numpy() @ dequantize(raw, FloatType.parse(form.name), columns).astype(np.float64).T
    found = guarded.cpu().numpy()
    assert (found[[0, -1]] == 7).all(), "written outside its rows"
    assert abs(found[1:-1] - expected).max() < 2e-3 * abs(expected).max()
