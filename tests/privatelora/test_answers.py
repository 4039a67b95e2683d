"""M·A·x, from the bytes of A·x to those of the answer."""

import numpy as np
import pytest

from dllama.engine.workspace import MAX_ROWS
from dllama.formats import FloatType
from dllama.privatelora.answers import Answers
from dllama.privatelora.passage import Stop, stops, targets_of
from dllama.privatelora.shape import AdapterShape
from dllama.privatelora.travel import Rows
from dllama.targets import TARGETS
from tests.formats.models import config
from tests.privatelora.adapters import random_halves

MODEL = config(n_layers=3)
FORMS = [FloatType.F32, FloatType.F16, FloatType.Q80]
BOUNDS = {FloatType.F32: 1e-6, FloatType.F16: 1e-2, FloatType.Q80: 5e-2}


def made(form=FloatType.F32, ranks=(33, 5), targets=tuple(TARGETS), layers=(0, 2), span=range(3)):
    """Answers, and the edge's half that they are of."""
    _, edge = random_halves(AdapterShape.of(MODEL, *ranks, targets, layers), 7)
    return Answers(edge, span, form), edge


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ranks", [(33, 5), (6, 40), (32, 32), (1, 1)])
def test_every_stop(form, ranks):
    answers, edge = made(form, ranks)
    rng = np.random.default_rng(2)
    for rows in (3, 2 * MAX_ROWS + 1, MAX_ROWS, 1):  # the buffers hold what was there before
        for stop in stops(edge.shape, range(3)):
            targets = targets_of(edge.shape, stop.product)
            x = rng.standard_normal((rows, len(targets), ranks[0]), np.float32)
            into, out_of = (Rows(form, len(targets) * rank) for rank in ranks)
            sent = into.encode(x.reshape(rows, -1))
            taken = into.decode(sent, rows).reshape(x.shape)
            found = out_of.decode(answers(stop, sent.tobytes(), rows), rows).reshape(rows, len(targets), -1)
            expected = np.stack([taken[:, i] @ edge.m(stop.layer, t).T for i, t in enumerate(targets)], 1)
            assert abs(found - expected).max() <= BOUNDS[form] * abs(expected).max()


def test_answers_are_filled_up_with_zeros():
    """And not with what the buffers hold of other products, whose rows are longer."""
    answers, edge = made(FloatType.F16, (32, 5))
    for stop in stops(edge.shape, range(3)):
        width = 5 * len(targets_of(edge.shape, stop.product))
        x = np.ones((4, width // 5 * 32), np.float16)
        found = answers(stop, x.tobytes(), 4).view(np.float16).reshape(4, 32)
        assert found[:, :width].all() and not found[:, width:].any()


def test_padding_that_a_cloud_fills_changes_nothing():
    answers, edge = made(FloatType.F16, (33, 5), ("q",))
    row = np.zeros(64, np.float16)
    row[:33] = 1
    plain = answers(Stop(0, 0), row.tobytes(), 1)
    row[33:] = 60000
    for _ in range(3):
        np.testing.assert_array_equal(answers(Stop(0, 0), row.tobytes(), 1), plain)
    other, _ = made(FloatType.F16, (33, 5), ("q",))
    np.testing.assert_array_equal(other(Stop(0, 0), row.tobytes(), 1), plain)


@pytest.mark.parametrize("stop", [Stop(1, 0), Stop(3, 0), Stop(1 << 32, 0), Stop(0, 1), Stop(2, 3)])
def test_a_stop_without_an_adapter(stop):
    answers, _ = made(targets=("q", "gate"), span=range(2))
    with pytest.raises(ValueError, match=f"product {stop.product} of layer {stop.layer}, which has no adapter"):
        answers(stop, bytes(4 * 33), 1)


@pytest.mark.parametrize("form", FORMS)
def test_another_number_of_bytes(form):
    answers, _ = made(form, targets=("q", "v"))
    row_bytes = Rows(form, 66).row_bytes
    for size in (0, 1, row_bytes, 3 * row_bytes, 2 * row_bytes + 1):
        with pytest.raises(ValueError, match=f"{size} bytes for 2 rows of {row_bytes} bytes"):
            answers(Stop(0, 0), bytes(size), 2)


@pytest.mark.parametrize("form, dtype", [(FloatType.F32, np.float32), (FloatType.F16, np.float16)])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_numbers_that_are_none(form, dtype, value):
    answers, _ = made(form, (32, 5), targets=("q",))
    x = np.ones((2, 32), dtype)
    x[1, 31] = value
    with pytest.raises(ValueError, match="infinite or no number"):
        answers(Stop(0, 0), x.tobytes(), 2)
