"""Edges that send random vectors through a backend's layers, and answer with random M."""

import numpy as np

from dllama.engine.workspace import Place
from dllama.privatelora.adapter import CloudAdapter
from dllama.privatelora.passage import PRODUCTS, Passage, stops, targets_of
from dllama.privatelora.shape import AdapterShape
from dllama.targets import DENSE, TARGETS

CONTEXT = 150
TIGHT = dict(rtol=2e-4, atol=2e-4)


class Edge:
    """One with an adapter of its own, or none, that sends random vectors through its layers."""

    def __init__(self, backend, seed, shape=None, layers=None, number=None):
        self.backend, self.shape = backend, shape
        self.layers = layers or range(backend.config.n_layers)
        self.rng = np.random.default_rng(seed)
        self.number = -1 if shape is None else number
        if shape is not None:
            if number is None:
                self.number = backend.add(CloudAdapter(shape, seed), self.layers)
            self.m = {place: 6 * self.rng.standard_normal(shape.m, np.float32) for place in shape.places()}
        self.sequence, self.position = backend.sequence(CONTEXT), 0

    def enter(self, n):
        places = [Place(self.sequence, self.position + i) for i in range(n)]
        self.position += n
        self.passage = Passage(places, self.number, self.rng.standard_normal((n, self.backend.config.dim), np.float32))

    def answer(self, stop, low):
        if self.shape is not None:
            names = PRODUCTS[stop.product]
            self.passage.answer = np.zeros((len(low), len(names), self.shape.r_d2c), np.float32)
            for name in targets_of(self.shape, stop.product):
                i = names.index(name)
                self.passage.answer[:, i] = low[:, i, : self.shape.r_c2d] @ self.m[stop.layer, name].T


def step(edges, pieces, grouped=lambda k, edges: [edges]):
    """Takes edges through their layers, so many rows of each; ``grouped``: which run together to their k-th stop."""
    backend, layers = edges[0].backend, edges[0].layers
    for edge, n in zip(edges, pieces, strict=True):
        edge.enter(n)
    at = layers.start
    for k, stop in enumerate(stops(edges[0].shape, layers)):
        for group in grouped(k, edges):
            lows = []
            passages = [edge.passage for edge in group]
            backend.run(passages, at, stop, lambda sent, lows=lows: lows.extend(low.copy() for low in sent))
            for edge, low in zip(group, lows, strict=True):
                edge.answer(stop, low)
        at = stop
    return backend.finish([edge.passage for edge in edges], at, layers.stop)


def shape_of(config, r_c2d=5, r_d2c=9, targets=tuple(TARGETS), layers=None):
    if config.arch.has_experts:
        targets = tuple(target for target in targets if target not in DENSE)
    return AdapterShape.of(config, r_c2d, r_d2c, targets, layers)


def alternately(k, edges):
    return [[edges], [edges[:1], edges[1:]], [edges[2:], edges[:2]]][k % 3]


def several_edges(backend):
    """Two adapters of other ranks, and one edge without: a prompt, one that crosses pages, and tokens after them."""
    config = backend.config
    edges = [Edge(backend, 1, shape_of(config)), Edge(backend, 2, shape_of(config, 12, 3)), Edge(backend, 3)]
    out = []
    for pieces in [(20, 62, 1), (1, 1, 1), (1, 2, 1), (1, 1, 1), (3, 1, 60)]:
        out += step(edges, pieces, alternately)
    return out


def agree(found, expected, **tolerance):
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, **(tolerance or TIGHT))
