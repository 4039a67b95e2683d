import numpy as np
import pytest

from dllama.formats import RopeType
from dllama.formats.rotary import interleave_pairs, split_pairs, to_checkpoint_order, to_model_order
from tests.formats.models import LLAMA, SHAPES, config


def test_interleaved_pairs():
    rows = np.arange(8)[:, None]  # two heads of four: rows i and i + 2 of a head are a pair
    assert interleave_pairs(rows, 4).ravel().tolist() == [0, 2, 1, 3, 4, 6, 5, 7]
    assert split_pairs(interleave_pairs(rows, 4), 4).tolist() == rows.tolist()


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_q_and_k_alone_change_their_order_and_only_where_neighbours_turn(shape):
    model = config(shape)
    for matrix, outputs in (("q", model.q_dim), ("k", model.kv_dim), ("v", model.kv_dim), ("o", model.dim)):
        rows = np.arange(3 * outputs).reshape(outputs, 3)
        found = to_model_order(rows, matrix, model)
        reordered = matrix in "qk" and model.rope_type is not RopeType.HALF_SPLIT
        np.testing.assert_array_equal(found, interleave_pairs(rows, model.head_dim) if reordered else rows)
        np.testing.assert_array_equal(to_checkpoint_order(found, matrix, model), rows)


def test_a_llama_file_may_turn_half_split_pairs():
    rows = np.arange(96)[:, None]
    assert to_model_order(rows, "q", config(LLAMA, rope_type=RopeType.HALF_SPLIT)) is rows
