"""Attacks on hidden states: from what entered the cloud's first layer back to the tokens.

All of them know the base model, the size of the noise and the token that every text begins with. The search also runs
candidates through the base's first layers, behind the tokens that it has recovered so far.
"""

import copy
from collections.abc import Sequence

import torch
from torch import nn
from transformers import DynamicCache

from bench.inversion_model import SplitModel, transmit, variance
from dllama.formats import FloatType

TEXTS = 16  # of a training step
MISFIT = 1.5  # times the squared distance that noise and rounding explain: the token is not among the candidates


def table(split: SplitModel, begin: int) -> torch.Tensor:
    """The state of each token behind the one that begins a text: float32 [vocabulary, dim].

    With no layer on the edge this is the embedding table.
    """
    vocabulary = torch.arange(split.base.config.vocab_size)
    return split.states(torch.stack([torch.full_like(vocabulary, begin), vocabulary], 1))[:, 1]


def distances(states: torch.Tensor, entries: torch.Tensor) -> torch.Tensor:
    """Squared ones to the entries of a table, less the states' own squares: [..., dim] -> [..., entries]."""
    return entries.square().sum(-1) - 2 * states @ entries.T


class Inverter(nn.Module):
    """Guesses tokens from states: with ``hidden`` = 0 by the softmax of a linear map, otherwise by a perceptron.

    before, after: neighbouring states that it sees as well
    """

    def __init__(self, dim: int, vocabulary: int, hidden: int = 0, before: int = 0, after: int = 0):
        super().__init__()
        self.before, self.after = before, after
        self.register_buffer("scale", torch.ones(dim))
        inputs = (before + 1 + after) * dim + 1
        if hidden:
            self.map = nn.Sequential(nn.Linear(inputs, hidden), nn.GELU(), nn.Linear(hidden, vocabulary))
        else:
            self.map = nn.Linear(inputs, vocabulary)

    def forward(self, states: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
        """Logits [texts, length, vocabulary] of states [texts, length, dim] with noise of size sigma [texts]."""
        size = (1 + sigma.square()).sqrt()[:, None, None]
        padded = nn.functional.pad(states / self.scale / size, (0, 0, self.before, self.after))
        windows = padded.unfold(1, self.before + 1 + self.after, 1).flatten(2)
        return self.map(torch.cat([windows, size.log().expand(*states.shape[:2], 1)], -1))

    def fit(self, states: torch.Tensor, tokens: torch.Tensor, sigmas: Sequence[float], steps: int, rate: float) -> None:
        """Train on clean states [texts, length, dim], to which each text gets noise of one of the sizes.

        rate: the highest learning rate
        """
        random = torch.Generator().manual_seed(0)
        self.scale.copy_(states[:, 1:].std((0, 1)))
        optimizer = torch.optim.AdamW(self.parameters(), rate)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
        for _ in range(steps):
            chosen = torch.randint(len(states), (TEXTS,), generator=random)
            sigma = torch.tensor(sigmas)[torch.randint(len(sigmas), (TEXTS,), generator=random)]
            sent = transmit(states[chosen], sigma[:, None, None], FloatType.F32, random)
            loss = nn.functional.cross_entropy(self(sent, sigma)[:, 1:].mT, tokens[chosen][:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

    @torch.no_grad()
    def guess(self, states: torch.Tensor, sigma: float) -> torch.Tensor:
        """The likeliest token of each state: int64 [texts, length]."""
        return self(states, torch.full((len(states),), sigma)).argmax(-1)


class PrefixSearch:
    """Runs candidates behind the tokens recovered so far through the edge's layers, and compares with what came.

    A candidate scores its log-likelihood: that of the difference as Gaussian noise, and that of the token by the base
    as a language model. The best ``beam`` texts are kept. ``shortlist`` candidates are the likeliest ones by the
    language model or by the table; where none of them explains the state, the whole vocabulary is tried.
    """

    def __init__(self, split: SplitModel, begin: int, beam: int, shortlist: int):
        self.split, self.begin, self.beam, self.shortlist = split, begin, beam, shortlist
        self.table = table(split, begin)

    @torch.no_grad()
    def __call__(self, sent: torch.Tensor, sigma: float) -> torch.Tensor:
        """Tokens, int64 [texts, length], of what the cloud got: float32 [texts, length, dim]."""
        texts, length, _ = sent.shape
        vocabulary = len(self.table)
        spread = variance(sent, sigma).repeat_interleave(self.beam, 0)
        sent = sent.repeat_interleave(self.beam, 0)
        found = torch.full((len(sent), 1), self.begin)
        scores = torch.full((texts, self.beam), -torch.inf)
        scores[:, 0] = 0
        base, edge = DynamicCache(), DynamicCache()
        for at in range(1, length):
            last = found[:, -1:]
            prior = self.split.base(last, past_key_values=base).logits[:, -1].log_softmax(-1)
            self.split.edge(last, past_key_values=edge)
            by_table = -distances(sent[:, at], self.table)
            fits = self._fits(edge, _best_of(prior, by_table, self.shortlist), sent[:, at], spread[:, at])
            lost = fits[:: self.beam].amax(-1) < -MISFIT * sent.shape[-1] / 2  # by the best text's candidates
            if lost.any() and self.shortlist < vocabulary:
                rows = self.beam * lost.nonzero()[:, 0]
                some = copy.deepcopy(edge)
                some.batch_select_indices(rows)
                everything = torch.arange(vocabulary).expand(len(rows), -1)
                fits[rows] = self._fits(some, everything, sent[rows, at], spread[rows, at])
            total = (scores.view(-1, 1) + prior + fits).view(texts, -1)
            scores, best = total.topk(self.beam, -1)
            source = (best // vocabulary + self.beam * torch.arange(texts)[:, None]).flatten()
            found = torch.cat([found[source], (best % vocabulary).view(-1, 1)], 1)
            base.reorder_cache(source)
            edge.reorder_cache(source)
        return found[:: self.beam]

    def _fits(self, cache: DynamicCache, tokens: torch.Tensor, sent: torch.Tensor, spread: torch.Tensor):
        """Log-likelihoods [rows, vocabulary] of the differences, less a constant; tokens [rows, candidates]."""
        difference = self._next_states(cache, tokens) - sent[:, None]
        likelihoods = -(difference.square() / (2 * spread[:, None])).sum(-1)
        return torch.full((len(tokens), len(self.table)), -torch.inf).scatter(1, tokens, likelihoods)

    def _next_states(self, cache: DynamicCache, tokens: torch.Tensor) -> torch.Tensor:
        """The state [rows, candidates, dim] of each candidate if it were the next token; the cache stays as it is."""
        count, past = tokens.shape[1], cache.get_seq_length()
        sees = torch.cat([torch.ones(count, past), torch.eye(count)], 1).bool()  # what is past, and itself
        position = torch.full((1, count), past)
        states = self.split.edge(tokens, sees[None, None], position, cache).last_hidden_state
        cache.crop(-count)
        return states


def _best_of(first: torch.Tensor, second: torch.Tensor, count: int) -> torch.Tensor:
    """The ``count`` columns that rank highest in either of two scores [rows, columns], each once."""
    ranks = [(-scores).argsort(-1).argsort(-1) for scores in (first, second)]
    return torch.minimum(*ranks).topk(min(count, first.shape[1]), -1, largest=False).indices
