"""A slice's way from one end to the other, in chunks."""

import os

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.cluster.planner import make_plan
from dllama.cluster.slices import SliceLayout, read
from dllama.cluster.transfer import MemoryIncoming, Sending, chunk_count, chunk_digest
from dllama.errors import ClusterError, FileError
from dllama.formats import ModelFile
from tests.cluster.models import TINY, equal_nodes
from tests.formats.models import write_random


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("transfer") / "a.m"
    write_random(path, TINY)
    with ModelFile(path) as model:
        yield model


@pytest.fixture(scope="module")
def layout(model):
    return SliceLayout(make_plan(TINY, equal_nodes(3)).shares[1])


def chunks(sending) -> list:
    return list(iter(sending.next, None))


@given(st.integers(1, 40_000), st.randoms())
def test_chunks_in_any_order_make_the_slice(model, layout, chunk_bytes, random):
    chunk_bytes = max(chunk_bytes, 200)
    sending, incoming = Sending(model, layout, chunk_bytes=chunk_bytes), MemoryIncoming(layout.nbytes, chunk_bytes)
    sent = chunks(sending)
    assert [chunk.index for chunk in sent] == list(range(chunk_count(layout.nbytes, chunk_bytes)))
    assert sending.done_bytes == sending.total_bytes == layout.nbytes
    random.shuffle(sent)
    with incoming:
        for chunk in sent:
            assert incoming.done_bytes < layout.nbytes
            incoming.write(chunk.index, chunk.data, chunk.digest)
        incoming.write(sent[0].index, bytes(sent[0].data), sent[0].digest)  # twice is once
        assert incoming.done_bytes == layout.nbytes
        found = incoming.finish()
    np.testing.assert_array_equal(found, read(model, layout, 0, layout.nbytes))


@given(st.data())
def test_what_the_worker_has_is_not_sent(model, layout, data):
    digests = [chunk.digest for chunk in chunks(Sending(model, layout, chunk_bytes=3000))]
    has = data.draw(st.lists(st.sampled_from(["it", "nothing", "another"]), max_size=len(digests) + 2))
    others = {"nothing": b"", "another": bytes(16)}
    held = [others.get(kind) or (digest if kind == "it" else b"") for kind, digest in zip(has, digests, strict=False)]
    sending = Sending(model, layout, held, chunk_bytes=3000)
    expected = [i for i, digest in enumerate(digests) if i >= len(held) or held[i] != digest]
    assert [chunk.index for chunk in chunks(sending)] == expected
    assert sending.done_bytes == layout.nbytes


def test_chunks_that_are_refused(model, layout):
    first, *_, last = chunks(Sending(model, layout, chunk_bytes=10_000))
    incoming = MemoryIncoming(layout.nbytes, 10_000)
    damaged = first.data.copy()
    damaged[77] ^= 1
    for chunk, message in (
        ((-1, first.data, first.digest), "chunk -1 of a slice that has"),
        ((last.index + 1, first.data, first.digest), f"chunk {last.index + 1} of a slice that has {last.index + 1}"),
        ((0, first.data[1:], first.digest), "chunk 0 has 9999 bytes in place of 10000"),
        ((last.index, first.data, first.digest), f"chunk {last.index} has 10000 bytes in place of {len(last.data)}"),
        ((0, b"", chunk_digest(b"")), "chunk 0 has 0 bytes"),
        ((0, damaged, first.digest), "chunk 0 arrived damaged"),
        ((0, first.data, first.digest[:-1]), "chunk 0 arrived damaged"),
    ):
        with pytest.raises(ClusterError, match=message):
            incoming.write(*chunk)
    assert set(incoming.held) == {b""}
    incoming.write(*last[:1], last.data, last.digest)
    assert incoming.done_bytes == len(last.data)
    with pytest.raises(ClusterError, match=f"{last.index} of {last.index + 1} chunks of the slice are missing"):
        incoming.finish()


def test_a_slice_of_nothing():
    with MemoryIncoming(0, 1 << 20) as incoming:
        assert incoming.held == []
        assert incoming.finish().shape == (0,)


def test_a_model_that_changes_while_it_is_sent(tmp_path, layout):
    write_random(tmp_path / "a.m", TINY)
    with ModelFile(tmp_path / "a.m") as model:
        sending = Sending(model, layout, chunk_bytes=10_000)
        assert sending.next().index == 0
        os.utime(tmp_path / "a.m", ns=(1, 1))
        with pytest.raises(FileError, match="a.m: the model has changed on disk since it was opened"):
            sending.next()
