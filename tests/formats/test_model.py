import resource
import subprocess
import sys
import textwrap
import tracemalloc
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.errors import FileError, FormatError
from dllama.formats import FloatType, ModelFile, ModelWriter, dequantize, quantize, tensor_kinds, tensor_layout
from dllama.formats.header import pack_header
from tests.formats.models import LLAMA, QWEN3, QWEN3_MOE, SHAPES, config, random_tensors, write_random


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight_type", FloatType)
def test_round_trip(tmp_path, shape, weight_type):
    model = config(SHAPES[shape], weight_type)
    written = write_random(tmp_path / "a.m", model)
    with ModelFile(tmp_path / "a.m") as file:
        assert file.config == model
        assert {(info.name, info.layer) for info in file.tensors()} == set(written)
        for (name, layer), values in written.items():
            info = file.info(name, layer)
            raw = quantize(np.atleast_2d(values), info.float_type)
            np.testing.assert_array_equal(file.raw(name, layer), raw)
            np.testing.assert_array_equal(
                file.f32(name, layer), dequantize(raw, info.float_type, info.columns).reshape(info.shape)
            )


def test_tensors_stand_in_the_order_of_the_format(tmp_path):
    model = config(QWEN3, FloatType.F32, n_layers=1)
    tensors = write_random(tmp_path / "a.m", model)
    names = ["embedding", *"qkvo", "w1", "w2", "w3", "q_norm", "k_norm", "attention_norm", "ffn_norm"]
    assert [name for name, _ in tensors] == [*names, "final_norm", "output"]
    data = (tmp_path / "a.m").read_bytes()
    assert data == pack_header(model) + b"".join(values.tobytes() for values in tensors.values())


def test_experts_stand_after_their_router_in_place_of_a_dense_network(tmp_path):
    model = config(QWEN3_MOE, FloatType.F32, n_layers=1)
    tensors = write_random(tmp_path / "a.m", model)
    experts = [f"{name}.{expert}" for expert in range(5) for name in ("w1", "w2", "w3")]
    norms = ["q_norm", "k_norm", "attention_norm", "ffn_norm", "final_norm"]
    assert [name for name, _ in tensors] == ["embedding", *"qkvo", "router", *experts, *norms, "output"]
    data = (tmp_path / "a.m").read_bytes()
    assert data == pack_header(model) + b"".join(values.tobytes() for values in tensors.values())
    with ModelFile(tmp_path / "a.m") as file:
        info = file.info("w2.3", 0)
    assert (info.kind, info.expert, info.shape, info.label) == ("w2", 3, (64, 32), "w2.3 of layer 0")


@pytest.mark.parametrize("shape", SHAPES)
def test_kinds_stand_for_all_tensors(shape):
    model = config(SHAPES[shape])
    tensors = list(tensor_layout(model))
    for kind in tensor_kinds(model):
        of_kind = [info for info in tensors if info.kind == kind.tensor.name]
        same = [replace(info, name=info.kind, layer=None, offset=0) for info in of_kind]
        assert same == [replace(kind.tensor, layer=None, offset=0)] * kind.count
        share = 2 / 5 if shape == "qwen3-moe" and kind.tensor.name in ("w1", "w2", "w3") else 1
        assert kind.active == share * kind.count
    assert sum(kind.count for kind in tensor_kinds(model)) == len(tensors)


def test_sizes_are_those_of_the_format():
    """Distributed Llama's published Llama 2 7B in Q40, with its embedding as F32: 4.24 GB."""
    model = config(dim=4096, hidden_dim=11008, n_layers=32, n_heads=32, n_kv_heads=32, head_dim=128, vocab_size=32000)
    last = list(tensor_layout(model))[-1]
    assert (last.offset + last.nbytes) / 1e9 == pytest.approx(4.24, abs=0.005)


def test_raw_is_a_read_only_view_that_outlives_close(tmp_path):
    write_random(tmp_path / "a.m", config())
    file = ModelFile(tmp_path / "a.m")
    raw, embedding = file.raw("q", 1), file.f32("embedding")
    assert not raw.flags.writeable and not raw.flags.owndata
    assert not embedding.flags.owndata and embedding.flags.aligned
    before = raw.copy()
    file.close()
    np.testing.assert_array_equal(raw, before)


def test_values_off_their_boundary_are_copied(tmp_path):
    """F16 matrices of odd sizes leave the norms after them between two float32 boundaries."""
    written = write_random(tmp_path / "a.m", config(LLAMA, FloatType.F16, dim=33, hidden_dim=35))
    with ModelFile(tmp_path / "a.m") as file:
        assert file.info("attention_norm", 0).offset % 4 == 2
        for layer in range(2):
            values = file.f32("attention_norm", layer)
            assert values.flags.aligned
            np.testing.assert_array_equal(values, written["attention_norm", layer])


@pytest.mark.parametrize("change, state", [(-1, "truncated"), (1, "oversized"), (1000, "oversized")])
def test_a_length_other_than_the_header_s_is_refused(tmp_path, change, state):
    path = tmp_path / "a.m"
    write_random(path, config())
    data = path.read_bytes()
    path.write_bytes(data[:change] if change < 0 else data + bytes(change))
    with pytest.raises(FormatError, match=f"a.m: {state}: {len(data):,} bytes expected, {len(data) + change:,} found"):
        ModelFile(path)


def test_files_that_cannot_be_opened(tmp_path):
    with pytest.raises(FileError, match="missing.m: no such file"):
        ModelFile(tmp_path / "missing.m")
    with pytest.raises(FileError, match="a folder, not a file"):
        ModelFile(tmp_path)
    (tmp_path / "empty.m").touch()
    with pytest.raises(FormatError, match="not a model: 0 bytes"):
        ModelFile(tmp_path / "empty.m")


def test_a_header_s_claims_allocate_nothing(tmp_path):
    """16384 layers of the largest matrices, 16 million tokens: petabytes, in a file of 130 bytes."""
    path = tmp_path / "a.m"
    big = config(dim=1 << 20, hidden_dim=1 << 20, n_layers=1 << 14, head_dim=1 << 18, vocab_size=1 << 24)
    path.write_bytes(pack_header(big))
    tracemalloc.start()
    with pytest.raises(FormatError, match="truncated"):
        ModelFile(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    """A path to write to, and the bytes of a sound model."""
    path = tmp_path_factory.mktemp("fuzz") / "a.m"
    write_random(path, config(n_layers=1, vocab_size=3, dim=32, hidden_dim=32, n_heads=1, n_kv_heads=1, head_dim=32))
    return path, path.read_bytes()


@given(data=st.binary(max_size=300))
def test_any_bytes_give_a_format_error(sound, data):
    path, _ = sound
    path.write_bytes(data)
    with pytest.raises(FormatError):
        ModelFile(path)


@given(
    edits=st.lists(st.tuples(st.integers(0, 130), st.integers(0, 255)), max_size=4),
    end=st.one_of(st.none(), st.integers(0, 200)),
    tail=st.binary(max_size=8),
)
def test_a_damaged_model_gives_a_format_error_or_whole_tensors(sound, edits, end, tail):
    path, data = sound
    damaged = bytearray(data[:end] + tail)
    for place, value in edits:
        if place < len(damaged):
            damaged[place] = value
    path.write_bytes(damaged)
    try:
        file = ModelFile(path)
    except FormatError:
        return
    with file:
        assert sum(info.nbytes for info in file.tensors()) == len(damaged) - file.header_bytes
        for info in file.tensors():
            assert file.f32(info.name, info.layer).shape == info.shape


def test_the_writer_takes_stored_bytes_and_chunks(tmp_path):
    model = config()
    tensors = write_random(tmp_path / "a.m", model)
    with ModelWriter(tmp_path / "b.m", model) as writer:
        for info in tensor_layout(model):
            rows = np.atleast_2d(tensors[info.name, info.layer])
            writer.write_chunks(
                info.name, info.layer, [rows[:1], quantize(rows[1:], info.float_type)] if len(rows) > 1 else [rows]
            )
    assert (tmp_path / "a.m").read_bytes() == (tmp_path / "b.m").read_bytes()


def test_the_writer_takes_tensors_in_any_order(tmp_path):
    model = config()
    tensors = write_random(tmp_path / "a.m", model)
    with ModelWriter(tmp_path / "b.m", model) as writer:
        for (name, layer), values in reversed(tensors.items()):
            writer.write(name, layer, values)
    assert (tmp_path / "a.m").read_bytes() == (tmp_path / "b.m").read_bytes()


def test_the_writer_holds_the_names_and_the_shapes(tmp_path):
    model = config()
    tensors = random_tensors(model)
    path = tmp_path / "a.m"
    with pytest.raises(ValueError, match=r"q \(layer 99\) is none of the model's"), ModelWriter(path, model) as writer:
        writer.write("q", 99, tensors["q", 0])
    with pytest.raises(ValueError, match=r"q \(layer 0\) .* or written already"), ModelWriter(path, model) as writer:
        writer.write("q", 0, tensors["q", 0])
        writer.write("q", 0, tensors["q", 0])
    with pytest.raises(ValueError, match=r"embedding: \(49, 64\)|49 of 50 rows"), ModelWriter(path, model) as writer:
        writer.write("embedding", None, tensors["embedding", None][:49])
    with pytest.raises(ValueError, match=r"embedding: \(50, 63\)"), ModelWriter(path, model) as writer:
        writer.write("embedding", None, tensors["embedding", None][:, :63])
    with pytest.raises(ValueError, match="closed before q of layer 0"), ModelWriter(path, model) as writer:
        writer.write("embedding", None, tensors["embedding", None])
    with pytest.raises(ValueError, match="embedding: values that are not finite"), ModelWriter(path, model) as writer:
        writer.write("embedding", None, np.full_like(tensors["embedding", None], np.nan))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_exception_leaves_what_was_there(tmp_path, interruption):
    path = tmp_path / "a.m"
    path.write_bytes(b"before")
    model = config()
    with pytest.raises(interruption), ModelWriter(path, model) as writer:
        writer.write("embedding", None, random_tensors(model)["embedding", None])
        raise interruption
    assert [p.name for p in tmp_path.iterdir()] == ["a.m"]
    assert path.read_bytes() == b"before"


def test_a_model_larger_than_the_disk_is_refused_before_it_is_written(tmp_path):
    big = config(dim=1 << 20, hidden_dim=1 << 20, n_layers=1 << 14, head_dim=1 << 18, vocab_size=1 << 24)
    with pytest.raises(FileError, match=r"a.m: the disk is too full: [\d,]+ bytes needed, [\d,]+ free"):
        ModelWriter(tmp_path / "a.m", big)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
def test_a_disk_that_fills_up_while_writing(tmp_path):
    """A limit on file sizes fails a write half way, as a full disk does."""
    script = f"""
        import resource
        from dllama.errors import FileError
        from tests.formats.models import config, write_random
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
        try:
            write_random({str(tmp_path / "a.m")!r}, config())
        except FileError as error:
            print(error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert "a.m: cannot be written: file too large (57,496 bytes needed" in done.stdout
    assert list(tmp_path.iterdir()) == []


def test_a_link_is_written_through(tmp_path):
    (tmp_path / "real.m").write_bytes(b"before")
    (tmp_path / "link.m").symlink_to("real.m")
    write_random(tmp_path / "link.m", config(LLAMA))
    assert (tmp_path / "link.m").is_symlink()
    ModelFile(tmp_path / "real.m").close()


def test_outputs_that_cannot_be_written(tmp_path):
    with pytest.raises(FileError, match="no such file or folder"):
        ModelWriter(tmp_path / "missing" / "a.m", config())
    with pytest.raises(FileError, match="not a regular file"):
        ModelWriter(tmp_path, config())
    with pytest.raises(FileError, match="/dev/null: exists and is not a regular file"):
        ModelWriter("/dev/null", config())
