"""A node's slice: every tensor's part, in the model's file and in a stream of its own."""

import os
import subprocess
import sys
import textwrap
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dllama.cluster.planner import make_plan
from dllama.cluster.slices import ALIGN, ModelSlice, SliceLayout, StoredSlice, read
from dllama.engine.pages import anonymous
from dllama.formats import FloatType, ModelFile, ModelWriter, tensor_layout
from tests.cluster.models import TINY, equal_nodes
from tests.cluster.test_share import plans
from tests.formats.models import write_random


def write_noise(path, config) -> None:
    """A model of random bytes, no two tensors alike."""
    rng = np.random.default_rng(1)
    with ModelWriter(path, config) as writer:
        for info in tensor_layout(config):
            writer.write(info.name, info.layer, rng.integers(0, 256, (info.rows, info.row_bytes), np.uint8))


def share_of(config, index=1, nodes=3):
    """Of three nodes the second: its slices begin and end inside of every matrix."""
    return make_plan(config, equal_nodes(nodes), [1] * nodes).shares[index]


@settings(max_examples=60)
@given(plans(), st.data())
def test_slices_are_those_of_the_shares_and_give_back_the_model(tmp_path_factory, plan, data):
    path = tmp_path_factory.getbasetemp() / "any.m"
    write_noise(path, plan.config)
    with ModelFile(path) as model:
        back = {(info.name, info.layer): np.zeros((info.rows, info.row_bytes), np.uint8) for info in model.tensors()}
        del back["embedding", None]
        for share in plan.shares:
            layout = SliceLayout(share)
            stream = read(model, layout, 0, layout.nbytes)
            mapped, stored = ModelSlice(model, share), StoredSlice(layout, stream)
            assert mapped.config == stored.config == model.config
            assert [(info.name, info.layer) for info in layout.tensors] == list(back)
            assert list(mapped.tensors()) == list(stored.tensors()) == list(layout.tensors)
            expected = np.zeros(layout.nbytes, np.uint8)
            for info in layout.tensors:
                rows, columns = share.slices[info.kind]
                first, end = map(info.float_type.row_bytes, (columns.start, columns.stop))
                raw = mapped.raw(info.name, info.layer)
                assert raw.shape == (info.rows, info.row_bytes) == (len(rows), end - first)
                assert raw.strides == (model.info(info.name, info.layer).row_bytes, 1)
                assert info.offset % ALIGN == 0
                assert info == mapped.info(info.name, info.layer) == stored.info(info.name, info.layer)
                np.testing.assert_array_equal(raw, stored.raw(info.name, info.layer))
                back[info.name, info.layer][rows.start : rows.stop, first:end] = raw
                expected[info.offset : info.offset + info.nbytes] = raw.ravel()
            np.testing.assert_array_equal(stream, expected)
            first = data.draw(st.integers(0, layout.nbytes))
            nbytes = data.draw(st.integers(0, layout.nbytes - first))
            np.testing.assert_array_equal(read(model, layout, first, nbytes), stream[first : first + nbytes])
        for (name, layer), raw in back.items():
            np.testing.assert_array_equal(raw, model.raw(name, layer))


@pytest.mark.parametrize("weight_type", FloatType)
def test_values(tmp_path, weight_type):
    """Odd sizes leave norms in the model's file off their boundaries; in the stream they are always on them."""
    config = replace(TINY, weight_type=weight_type)
    if not weight_type.is_quantized:
        config = replace(config, dim=63, hidden_dim=191)
    write_random(tmp_path / "a.m", config)
    with ModelFile(tmp_path / "a.m") as model:
        share = share_of(config)
        layout = SliceLayout(share)
        mapped, stored = ModelSlice(model, share), StoredSlice(layout, read(model, layout, 0, layout.nbytes))
        for info in layout.tensors:
            rows, columns = share.slices[info.kind]
            whole = model.f32(info.name, info.layer).reshape(-1, model.info(info.name, info.layer).columns)
            expected = whole[rows.start : rows.stop, columns.start : columns.stop].reshape(info.shape)
            for slices in (mapped, stored):
                values = slices.f32(info.name, info.layer)
                assert values.flags.aligned
                np.testing.assert_array_equal(values, expected)
            if info.is_vector:
                assert not stored.f32(info.name, info.layer).flags.owndata


def test_a_slice_without_rows_or_columns_of_some_matrices(tmp_path):
    """One block of hidden values and three tokens over four nodes: somebody goes without."""
    config = replace(TINY, hidden_dim=32, vocab_size=3)
    write_noise(tmp_path / "a.m", config)
    with ModelFile(tmp_path / "a.m") as model:
        share = share_of(config, index=3, nodes=4)
        layout = SliceLayout(share)
        stored = StoredSlice(layout, read(model, layout, 0, layout.nbytes))
        for slices in (ModelSlice(model, share), stored):
            shapes = {name: slices.raw(name, 0).shape for name in ("w1", "w2", "w3")}
            assert shapes == {"w1": (0, 36), "w2": (64, 0), "w3": (0, 36)}
            assert slices.f32("w1", 0).shape == (0, 64)
            assert slices.f32("w2", 0).shape == (64, 0)
            assert slices.raw("output").shape == (0, 36)
            slices.release("w1", 0)
            slices.release("w2", 0)
            with pytest.raises(KeyError):
                slices.info("embedding")


def test_bytes_that_the_stream_does_not_have(tmp_path):
    write_noise(tmp_path / "a.m", TINY)
    with ModelFile(tmp_path / "a.m") as model:
        layout = SliceLayout(share_of(TINY))
        for first, nbytes in ((-1, 2), (0, layout.nbytes + 1), (layout.nbytes, 1), (5, -1)):
            with pytest.raises(ValueError, match="of a slice of"):
                read(model, layout, first, nbytes)
        with pytest.raises(ValueError, match="its layout asks for"):
            StoredSlice(layout, np.zeros(layout.nbytes - 1, np.uint8))


def test_a_layout_is_the_same_for_the_root_which_holds_the_embedding_besides():
    root = share_of(TINY, index=0)
    assert SliceLayout(root).tensors == SliceLayout(replace(root, is_root=False)).tensors


def test_released_tensors_leave_their_neighbours_as_they_are(tmp_path):
    config = replace(TINY, dim=512, hidden_dim=1024)
    write_noise(tmp_path / "a.m", config)
    with ModelFile(tmp_path / "a.m") as model:
        share = share_of(config)
        layout = SliceLayout(share)
        stream = read(model, layout, 0, layout.nbytes)
        memory = anonymous(layout.nbytes, huge=False)
        memory[:] = stream
        mapped, in_memory = ModelSlice(model, share), StoredSlice(layout, memory)
        for info in layout.tensors:
            for slices in (mapped, in_memory):
                np.testing.assert_array_equal(
                    slices.raw(info.name, info.layer).ravel(), stream[info.offset : info.offset + info.nbytes]
                )
                slices.release(info.name, info.layer)
        for info in layout.tensors:  # a file's bytes are there again
            np.testing.assert_array_equal(
                mapped.raw(info.name, info.layer).ravel(), stream[info.offset : info.offset + info.nbytes]
            )
        if sys.platform == "linux":  # memory's are not
            assert np.count_nonzero(memory) < len(layout.tensors) * 2 * os.sysconf("SC_PAGESIZE")


MEMORY = """
    import sys
    from dllama.cluster.planner import make_plan
    from dllama.cluster.slices import ModelSlice, SliceLayout, read
    from dllama.formats import ModelFile
    from tests.cluster.models import equal_nodes

    def resident(kind):
        return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith(kind + ":")) << 10

    with ModelFile(sys.argv[1]) as model:
        plan = make_plan(model.config, equal_nodes(3), [1, 1, 1])
        layouts = [SliceLayout(share) for share in plan.shares]
        before, highest = resident("RssFile"), 0
        for first in range(0, max(layout.nbytes for layout in layouts), 1 << 20):
            for layout in layouts:
                start = min(first, layout.nbytes)
                read(model, layout, start, min(1 << 20, layout.nbytes - start))
            highest = max(highest, resident("RssFile") - before)
        left = resident("RssFile") - before
        mapped = ModelSlice(model, plan.shares[1])
        for info in mapped.tensors():
            mapped.raw(info.name, info.layer).sum()
            mapped.release(info.name, info.layer)
        print(sum(layout.nbytes for layout in layouts), highest, left, resident("RssFile") - before - left)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_node_sends_slices_in_little_memory(tmp_path):
    """Three slices at once of a model of 240 MB."""
    config = replace(TINY, dim=1024, hidden_dim=4096, n_layers=23, n_heads=32, n_kv_heads=8, vocab_size=8000)
    path = tmp_path / "large.m"
    write_noise(path, config)
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(MEMORY), path], capture_output=True, text=True)
    assert done.stderr == ""
    total, highest, left, used = map(int, done.stdout.split())
    assert total > 190e6
    assert max(highest, left, used) < 8e6
    path.unlink()
