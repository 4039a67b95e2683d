"""Sessions share adapters, and the last lets go of them."""

import pytest

from dllama.engine.adapters import NO_ADAPTER
from dllama.formats import FloatType
from dllama.privatelora.adapter import CloudAdapter
from dllama.privatelora.backends.open import open_backend
from dllama.privatelora.frozen_weights import MOST_ADAPTERS
from dllama.privatelora.session import Unfit
from dllama.privatelora.shape import AdapterShape
from dllama.privatelora.shared_adapters import SharedAdapters
from tests.engine.models import MHA, random_model

LAYERS = range(2)


@pytest.fixture
def shared(tmp_path):
    backend = open_backend("cpu", 1, FloatType.Q80, FloatType.F16, print)(
        random_model(tmp_path / "m.m", MHA), lambda done, total: None
    )
    return SharedAdapters(backend)


@pytest.fixture
def made(shared):
    """Makes adapters that differ in their seeds."""
    shape = AdapterShape.of(shared._backend.config, 1, 1, ("q",))
    return lambda seed: CloudAdapter(shape, seed)


def test_an_adapter_is_there_once_until_the_last_has_given_it_back(shared, made):
    number = shared.take(made(1), LAYERS)
    assert shared.take(made(1), LAYERS) == number
    others = [shared.take(made(2), LAYERS), shared.take(made(1), range(1))]
    assert len({number, *others}) == 3
    shared.give_back(number)
    assert shared.take(made(3), LAYERS) not in {number, *others}
    shared.give_back(number)
    assert shared.take(made(4), LAYERS) == number


def test_none_takes_no_room(shared, made):
    assert {shared.take(None, LAYERS) for _ in range(MOST_ADAPTERS + 1)} == {NO_ADAPTER}
    for seed in range(MOST_ADAPTERS):
        shared.take(made(seed), LAYERS)
    with pytest.raises(Unfit, match=f"{MOST_ADAPTERS} adapters already"):
        shared.take(made(MOST_ADAPTERS), LAYERS)
    assert shared.take(made(0), LAYERS) >= 0
