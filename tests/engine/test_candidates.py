"""Candidates of any split of the rows against the sampler that sees all rows, and their bytes against bad ones."""

import math
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllama.engine.candidates import MAX_RECENT, Candidates, Reduction, merge, pack, reduce, unpack
from dllama.engine.filters import penalise
from dllama.engine.sampler import Sampler, SamplerSettings, likely
from dllama.errors import ModelError

GREEDY = Reduction(temperature=0.0)
TOP_K = Reduction(top_k=3)
MIN_P = Reduction(min_p=0.1)
TOP_P = Reduction(negligible=0.01)
REDUCTIONS = [Reduction.ALL, GREEDY, TOP_K, MIN_P, TOP_P]

ONE_LARGE = np.array([0, 9, 1, -3, 2, 3, 2, 0], np.float32)


def columns(values) -> st.SearchStrategy[np.ndarray]:
    return st.lists(values, min_size=1, max_size=60).map(lambda drawn: np.array(drawn, np.float32))


def many(seed: int) -> np.ndarray:
    """Logits of a larger vocabulary, shaped like those of a model: a bulk, some above it, equal ones among them."""
    random = np.random.default_rng(seed)
    logits = random.normal(0, random.uniform(0.5, 4), random.integers(200, 3000)).astype(np.float32)
    logits[random.integers(0, len(logits), 8)] += random.uniform(0, 15, 8).astype(np.float32)
    return np.round(logits, random.integers(0, 6))


# Few distinct values, so that equal logits are common.
few_values = st.sampled_from([-math.inf, -37.0, -4.0, 0.0, 0.25, 1.0, 6.0])
logits = columns(few_values) | columns(few_values | st.floats(-30, 30, width=32)) | st.integers(0, 2**32).map(many)

sampler_settings = st.builds(
    SamplerSettings,
    temperature=st.just(0.0) | st.floats(1e-6, 1e-3) | st.floats(0.05, 10),
    top_k=st.just(0) | st.integers(1, 80),
    top_p=st.just(1.0) | st.floats(0.01, 0.999) | st.sampled_from([0.1, 0.25, 0.5, 0.75]),
    min_p=st.just(0.0) | st.floats(0, 1),
    repetition_penalty=st.just(1.0) | st.floats(0.5, 2),
    seed=st.integers(0, 2**32),
)

reductions = st.builds(
    Reduction,
    temperature=st.floats(0, 10),
    top_k=st.integers(0, 80),
    min_p=st.just(0.0) | st.floats(0, 1),
    negligible=st.floats(0, 1),
    penalty=st.floats(0.5, 2),
    recent=st.lists(st.integers(0, 100), max_size=20).map(tuple),
)


def split(logits: np.ndarray, cuts: list[int], reduction: Reduction) -> Candidates:
    """The merged candidates of nodes with the rows between the cuts, each sent and received."""
    parts = []
    for start, end in zip([0, *cuts], [*cuts, len(logits)], strict=True):
        received = Reduction.from_list(reduction.to_list())
        data = pack(reduce(logits[start:end], start, received))
        parts.append(unpack(data, reduction, range(start, end)))
    return merge(parts, reduction)


@settings(max_examples=400)
@given(logits, sampler_settings, st.data())
def test_any_split_gives_the_same_token(logits, settings, data):
    cuts = sorted(data.draw(st.lists(st.integers(0, len(logits)), max_size=6)))
    history = data.draw(st.lists(st.integers(0, len(logits) - 1), max_size=80))
    one, several = Sampler(settings, len(logits)), Sampler(settings, len(logits))
    reduction = several.reduction(history)
    merged = split(logits, cuts, reduction)
    if logits.max() == -math.inf:
        with pytest.raises(ModelError):
            several.choose(merged)
        return
    if settings.temperature:
        for found, expected in zip(
            likely(merged, settings), likely(reduce(logits, 0, reduction), settings), strict=True
        ):
            assert np.array_equal(found, expected)
    drawn = [one.sample(logits, history) for _ in range(3)]
    assert [several.choose(merged) for _ in range(3)] == drawn


@settings(max_examples=15)
@given(st.integers(0, 2**32))
def test_each_row_on_a_node_of_its_own_gives_the_same_tokens(seed):
    logits = many(seed)
    for chosen in ({"temperature": 0.0}, {"top_k": 40}, {"min_p": 0.05}, {"top_p": 0.9}, {"top_p": 1.0}):
        one, several = (Sampler(SamplerSettings(**chosen, seed=seed), len(logits)) for _ in range(2))
        merged = split(logits, list(range(1, len(logits))), several.reduction([]))
        assert [several.choose(merged) for _ in range(20)] == [one.sample(logits, []) for _ in range(20)]


@pytest.mark.parametrize("cuts", [[], [10], [55], [3, 7, 40]])
@pytest.mark.parametrize(("p", "kept"), [(0.1, 1), (0.5, 5), (0.51, 6), (0.55, 6), (0.7, 7), (0.9, 9)])
def test_rounding_adds_no_token_where_equal_ones_reach_top_p(p, kept, cuts):
    logits = np.array([0] * 10 + [-37] * 90, np.float32)  # these 90 add 8e-15, where a sum does not lose them
    settings = SamplerSettings(1.0, top_p=p)
    merged = split(logits, cuts, Sampler(settings, 100).reduction([]))
    assert likely(merged, settings)[0].tolist() == list(range(kept))


@given(st.integers(0, 2**32), st.floats(0.3, 2), st.floats(0.1, 0.99))
def test_the_mass_of_parts_is_the_mass_of_the_whole(seed, temperature, p):
    logits = many(seed)
    reduction = Sampler(SamplerSettings(temperature, top_p=p), len(logits)).reduction([])
    expected = math.fsum(np.exp((logits.astype(np.float64) - logits.max()) / temperature))
    assert split(logits, [100, 190], reduction).mass == pytest.approx(expected, rel=1e-13)


def test_what_is_kept():
    def kept(reduction):
        return reduce(ONE_LARGE, 100, reduction).ids.tolist()

    assert kept(Reduction.ALL) == list(range(100, 108))
    assert kept(GREEDY) == [101]
    assert kept(TOP_K) == [101, 104, 105]  # the lower of the two that are equal
    assert kept(Reduction(min_p=math.exp(-6.5))) == [101, 105]
    assert kept(Reduction(negligible=math.exp(-6.5))) == [101, 105]
    assert kept(Reduction(negligible=1.0)) == [101]


def test_the_penalty_is_of_the_rows_that_the_node_has():
    logits = np.array([4, -4, 2, 1], np.float32)
    recent = (0, 1, 3, 2**32 - 1)
    whole = penalise(logits, [0, 1, 3], 2.0)
    for start, end in [(0, 2), (1, 3), (2, 4), (3, 3)]:
        part = reduce(logits[start:end], start, Reduction(penalty=2.0, recent=recent))
        assert part.logits.tolist() == whole[start:end].tolist()
    assert logits.tolist() == [4, -4, 2, 1]


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("where", [1, 6, 18])
def test_one_bad_logit_on_any_node_is_an_error_at_the_root(reduction, bad, where):
    logits = np.arange(20, dtype=np.float32)
    logits[where] = bad
    sampler = Sampler(SamplerSettings(reduction.temperature), 20)
    with pytest.raises(ModelError, match=f"not a distribution: the largest is {bad}"):
        sampler.choose(split(logits, [7, 13], reduction))


@pytest.mark.parametrize("chosen", [{"temperature": 0.0}, {"top_k": 1}, {"min_p": 0.5}, {"top_p": 0.5}, {"top_p": 1.0}])
def test_rows_that_are_all_forbidden_do_no_harm(chosen):
    logits = np.full(20, -np.inf, np.float32)
    logits[[9, 11]] = 3, 50
    sampler = Sampler(SamplerSettings(**chosen), 20)
    assert sampler.choose(split(logits, [7, 13], sampler.reduction([]))) == 11


def test_bytes_of_candidates():
    floats = ONE_LARGE.tolist()
    assert pack(reduce(ONE_LARGE, 100, GREEDY)) == struct.pack("<If", 101, 9)
    assert pack(reduce(ONE_LARGE, 100, TOP_K)) == struct.pack("<IfIfIf", 101, 9, 104, 2, 105, 3)
    assert pack(reduce(ONE_LARGE, 100, MIN_P)) == struct.pack("<If", 101, 9)
    assert pack(reduce(ONE_LARGE, 100, Reduction.ALL)) == struct.pack("<8f", *floats)
    mass, token, logit = struct.unpack("<dIf", pack(reduce(ONE_LARGE, 100, TOP_P)))
    assert (mass, token, logit) == (pytest.approx(sum(math.exp(value - 9) for value in floats)), 101, 9)


@given(logits, reductions, st.integers(0, 1000))
def test_candidates_take_no_more_bytes_than_all_logits_and_come_back(logits, reduction, first):
    candidates = reduce(logits, first, reduction)
    data = pack(candidates)
    assert len(data) <= 8 * reduction.has_mass + 4 * len(logits)
    if reduction.is_greedy or reduction.top_k:
        assert len(data) <= 8 * max(1, reduction.top_k)
    received = unpack(memoryview(data), reduction, candidates.rows)
    assert (received.rows, received.mass) == (candidates.rows, candidates.mass)
    assert (received.ids.dtype, received.logits.dtype) == (np.int64, np.float32)
    assert np.array_equal(received.ids, candidates.ids)
    assert np.array_equal(received.logits, candidates.logits)


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_no_rows_take_no_bytes(reduction):
    candidates = reduce(np.empty(0, np.float32), 5, reduction)
    assert pack(candidates) == b""
    assert len(unpack(b"", reduction, range(5, 5)).ids) == 0
    with pytest.raises(ValueError, match="8 bytes are no candidates of 0 rows"):
        unpack(bytes(8), reduction, range(5, 5))


def pairs(*ids: int) -> bytes:
    return b"".join(struct.pack("<If", token, 1.0) for token in ids)


@pytest.mark.parametrize(
    ("reduction", "data"),
    [
        (Reduction.ALL, pairs(10)),
        (Reduction.ALL, bytes(39)),
        (GREEDY, b""),
        (GREEDY, bytes(7)),
        (GREEDY, pairs(11, 12)),
        (GREEDY, pairs(9)),
        (GREEDY, pairs(20)),
        (GREEDY, pairs(2**32 - 1)),
        (TOP_K, pairs(11, 12, 13, 14)),
        (TOP_K, pairs(11, 11)),
        (TOP_K, pairs(13, 12)),
        (MIN_P, pairs(*range(10, 16))),
        (TOP_P, b""),
        (TOP_P, bytes(4)),
        (TOP_P, bytes(8)),
        (TOP_P, struct.pack("<d", 1.0) + pairs(11)[:-1]),
        (TOP_P, struct.pack("<d", math.nan) + pairs(11)),
        (TOP_P, struct.pack("<d", math.inf) + pairs(11)),
        (TOP_P, struct.pack("<d", -1.0) + pairs(11)),
        (TOP_P, struct.pack("<d", 10.5) + bytes(40)),
    ],
)
def test_bytes_that_are_no_candidates_are_refused(reduction, data):
    with pytest.raises(ValueError):
        unpack(data, reduction, range(10, 20))


@given(st.binary(max_size=120) | st.lists(st.integers(5, 20), max_size=9).map(lambda ids: pairs(*ids)), reductions)
def test_any_bytes_are_refused_or_give_candidates_of_the_rows(data, reduction):
    try:
        candidates = unpack(data, reduction, range(7, 18))
    except ValueError:
        return
    ids = candidates.ids.tolist()
    assert ids == sorted(set(ids)) and set(ids) <= set(range(7, 18))
    assert len(candidates.logits) == len(ids) > 0


@given(reductions)
def test_a_reduction_travels_as_a_list(reduction):
    assert Reduction.from_list(reduction.to_list()) == reduction


def test_a_reduction_of_numpy_numbers_travels():
    fields = Reduction(1, np.int64(3), recent=tuple(np.arange(2))).to_list()
    assert fields == [1.0, 3, 0.0, 0.0, 1.0, [0, 1]]
    assert [type(value) for value in [*fields, *fields[-1]]] == [float, int, float, float, float, list, int, int]


FIELDS = Reduction.ALL.to_list()


@pytest.mark.parametrize(
    "fields",
    [
        None,
        7,
        {},
        [],
        FIELDS[:-1],
        [*FIELDS, 0],
        *(
            [*FIELDS[:index], value, *FIELDS[index + 1 :]]
            for index, values in enumerate(
                [
                    [-0.1, math.inf, math.nan, "1", None, True],
                    [-1, 2**32, 1.0, True],
                    [-0.1, 1.1, math.nan, b"0"],
                    [-0.1, 1.1, math.nan, []],
                    [0.0, -1.0, math.inf, math.nan],
                    [None, 3, "12", [-1], [2**32], [1.0], [[]], [True], [0] * (MAX_RECENT + 1)],
                ]
            )
            for value in values
        ),
    ],
)
def test_lists_that_are_no_reduction_are_refused(fields):
    with pytest.raises(ValueError, match="reduction"):
        Reduction.from_list(fields)
