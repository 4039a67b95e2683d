"""A and B in the cloud's memory: adapters that come and go."""

import ctypes

import numpy as np
import pytest

from dllama.engine.adapter_weights import NUMBERS
from dllama.errors import OutOfMemoryError
from dllama.kernels import tags
from dllama.privatelora import frozen_weights
from dllama.privatelora.frozen_weights import MOST_ADAPTERS, FrozenWeights
from dllama.privatelora.shape import AdapterShape
from dllama.targets import TARGETS
from tests.formats.models import config
from tests.privatelora.adapters import random_halves

MODEL = config(n_layers=3)
SHAPE = AdapterShape.of(MODEL, 5, 3, ("q", "down"), (0, 2))


def values(address: int, dtype: type, *shape: int) -> np.ndarray:
    """What lies there."""
    nbytes = np.dtype(dtype).itemsize * int(np.prod(shape))
    return np.frombuffer(ctypes.string_at(int(address), nbytes), dtype).reshape(shape)


def cloud_half(seed=7):
    return random_halves(SHAPE, seed)[0]


@pytest.mark.parametrize("form, dtype", [(tags.F32, np.float32), (tags.F16, np.float16)])
def test_where_a_and_b_are(form, dtype):
    weights, adapter = FrozenWeights(MODEL, form), cloud_half()
    weights.add(cloud_half(1), range(3))
    number = weights.add(adapter, range(3))
    for layer, target in adapter.shape.places():
        record = weights.records[number, layer, NUMBERS[target]]
        b = adapter.b_in_model(layer, target, MODEL)
        assert (record["a_rank"], record["b_rank"], record["outputs"]) == (5, 3, len(b))
        a = values(record["a"], dtype, 5, record["inputs"])
        np.testing.assert_array_equal(a, adapter.a(layer, target).astype(dtype))
        columns = values(record["b"], dtype, 3, -(-len(b) // 32) * 32)
        np.testing.assert_array_equal(columns[:, : len(b)], b.T.astype(dtype))
        assert not columns[:, len(b) :].any()
    adapted = {(layer, NUMBERS[target]) for layer, target in adapter.shape.places()}
    assert {(int(i), int(j)) for i, j in np.argwhere(weights.records[number]["b_rank"])} == adapted


def test_only_layers_that_are_worked_here():
    weights, adapter = FrozenWeights(MODEL, tags.F32), cloud_half()
    number = weights.add(adapter, range(1, 3))
    assert weights.records[number]["a_rank"].any(axis=1).tolist() == [False, False, True]
    assert weights.nbytes(adapter, range(3)) == 2 * weights.nbytes(adapter, range(1, 3)) > 0
    assert weights.nbytes(adapter, range(1, 2)) == 0


def test_numbers_are_used_again():
    weights = FrozenWeights(MODEL, tags.F32)
    assert [weights.add(cloud_half(seed), range(3)) for seed in range(3)] == [0, 1, 2]
    weights.remove(1)
    assert not weights.records[1]["a_rank"].any() and not weights.records[1]["b_rank"].any()
    assert weights.add(cloud_half(4), range(3)) == 1
    record = weights.records[1, 0, NUMBERS["q"]]
    np.testing.assert_array_equal(values(record["a"], np.float32, *SHAPE.a("q")), cloud_half(4).a(0, "q"))
    assert weights.add(cloud_half(5), range(3)) == 3


def test_no_more_than_there_is_room_for():
    weights, adapter = FrozenWeights(MODEL, tags.F32), cloud_half()
    for _ in range(MOST_ADAPTERS):
        weights.add(adapter, range(3))
    with pytest.raises(LookupError, match=f"the cloud has {MOST_ADAPTERS} adapters already, and room for no more"):
        weights.add(adapter, range(3))
    weights.remove(17)
    assert weights.add(adapter, range(3)) == 17


def test_more_than_there_is_memory_for(monkeypatch):
    monkeypatch.setattr(frozen_weights, "available_bytes", lambda: 1000)
    weights = FrozenWeights(MODEL, tags.F32)
    with pytest.raises(OutOfMemoryError, match="the adapter needs .* of the cloud, 1 kB are free"):
        weights.add(cloud_half(), range(3))
    assert weights.add(cloud_half(), range(1, 2)) == 0, "of these layers it has none"


def test_an_adapter_that_cannot_be_made_takes_no_room(monkeypatch):
    weights = FrozenWeights(MODEL, tags.F32)

    def fail(*_):
        raise MemoryError

    with monkeypatch.context() as patch:
        patch.setattr(type(cloud_half()), "b_in_model", fail)
        with pytest.raises(MemoryError):
            weights.add(cloud_half(), range(3))
    assert not weights.records["a_rank"].any()
    assert weights.add(cloud_half(), range(3)) == 0


def test_widths_are_the_models():
    records = FrozenWeights(MODEL, tags.F32).records
    for name, target in TARGETS.items():
        assert (records[..., NUMBERS[name]]["inputs"] == getattr(MODEL, target.inputs)).all()
        assert (records[..., NUMBERS[name]]["outputs"] == getattr(MODEL, target.outputs)).all()
    assert len(records) == frozen_weights.MOST_ADAPTERS
