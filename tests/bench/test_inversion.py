"""What the cloud can find out: M from what it sends and gets, tokens from hidden states."""

import numpy as np
import pytest

from bench.inversion_adapter import exchange, recovery, solve_for_m
from dllama.formats import FloatType

RANK = 32
BEGIN = 1


@pytest.fixture
def m():
    return np.random.default_rng(1).standard_normal((RANK, RANK), dtype=np.float32)


@pytest.fixture
def u():
    return np.random.default_rng(2).standard_normal((4 * RANK, RANK), dtype=np.float32)


def test_as_many_rows_as_ranks_give_m(m, u):
    found = solve_for_m(*exchange(m, u[:RANK], FloatType.F32))
    np.testing.assert_allclose(found, m, atol=1e-3)


def test_fewer_rows_leave_it_open(m, u):
    found = solve_for_m(*exchange(m, u[: RANK // 2], FloatType.F32))
    assert np.linalg.norm(found - m) > 0.5 * np.linalg.norm(m)


def test_rounded_answers_give_it_nearly_and_better_with_more_rows():
    x = np.random.default_rng(3).standard_normal((1000, 64), dtype=np.float32)
    few, _ = recovery(x, RANK, 2 * RANK, FloatType.Q80)
    many, _ = recovery(x, RANK, 12 * RANK, FloatType.Q80)
    assert 0 < many < few < 0.1


@pytest.fixture(scope="module")
def base():
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=16,
    )
    return transformers.LlamaForCausalLM(config).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def tokens(base):
    import torch

    tokens = torch.randint(64, (3, 12), generator=torch.Generator().manual_seed(1))
    tokens[:, 0] = BEGIN
    return tokens


@pytest.mark.parametrize("layers", [0, 1, 2])
def test_the_halves_are_the_whole(base, tokens, layers):
    from bench.inversion_model import SplitModel

    split = SplitModel(base, layers)
    loss = base(tokens, labels=tokens).loss
    assert split.perplexity(split.states(tokens), tokens) == pytest.approx(float(loss.exp()), rel=1e-4)


@pytest.mark.parametrize("layers", [0, 1, 2])
@pytest.mark.parametrize("shortlist", [2, 64])  # 2: the whole vocabulary has to be tried nearly always
def test_search_recovers_every_token_without_noise(base, tokens, layers, shortlist):
    import torch

    from bench.inversion_attacks import PrefixSearch
    from bench.inversion_model import SplitModel, transmit

    split = SplitModel(base, layers)
    sent = transmit(split.states(tokens), 0.0, FloatType.Q80, torch.Generator())
    assert (PrefixSearch(split, BEGIN, beam=2, shortlist=shortlist)(sent, 0.0) == tokens).all()


def test_noise_is_as_large_as_asked_and_the_receiver_can_tell(base):
    import torch

    from bench.inversion_model import transmit, variance

    states = torch.randn((40, 50, 32), generator=torch.Generator().manual_seed(2)) * 3
    sent = transmit(states, 0.5, FloatType.Q80, torch.Generator().manual_seed(3))
    error = (sent - states).square().mean()
    assert float(error) == pytest.approx(0.25 * 9, rel=0.05)
    assert float(variance(sent, 0.5).mean()) == pytest.approx(float(error), rel=0.05)
