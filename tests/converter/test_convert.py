import hashlib
import os
import resource
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest

from converter.convert import Settings, convert
from converter.quantise import quantise
from dllama.errors import FileError, FormatError
from dllama.formats import FloatType, ModelFile, quantize
from dllama.formats.imatrix import ImportanceMatrix, write_imatrix
from dllama.formats.manifest import read_manifest
from dllama.formats.rotary import interleave_pairs
from dllama.formats.tensor import read_bytes
from tests.converter.checkpoints import (
    LLAMA,
    QWEN3,
    random_weights,
    shapes,
    write,
    write_gguf,
    write_meta,
    write_sparse,
)
from tests.converter.gguf_files import LLAMA as GGUF
from tests.converter.gguf_files import gguf_bytes, model

FORMS = {
    "safetensors": lambda folder, weights: write(folder, LLAMA, weights, "F16"),
    "sharded safetensors": lambda folder, weights: write(folder, LLAMA, weights, "F16", 3),
    "bin": lambda folder, weights: write(folder, LLAMA, weights, "F16", 1, "bin"),
    "sharded bin": lambda folder, weights: write(folder, LLAMA, weights, "F16", 3, "bin"),
    "Meta": lambda folder, weights: write_meta(folder, LLAMA, weights),
    "sharded Meta": lambda folder, weights: write_meta(folder, LLAMA, weights, 2),
    "GGUF": lambda path, weights: write_gguf(path, LLAMA, weights, "F16"),
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_bytes_at_every_run(tmp_path, form):
    """The first form's logits are compared with transformers' in tests/engine/test_transformers.py."""
    weights = random_weights(LLAMA, "F16")
    convert(FORMS["safetensors"](tmp_path / "first", weights), tmp_path / "first.m")
    folder = FORMS[form](tmp_path / "checkpoint", weights)
    convert(folder, tmp_path / "a.m")
    convert(folder, tmp_path / "b.m")
    expected = (tmp_path / "first.m").read_bytes()
    assert (tmp_path / "a.m").read_bytes() == expected == (tmp_path / "b.m").read_bytes()
    assert (tmp_path / "a.m.json").read_bytes() == (tmp_path / "b.m.json").read_bytes()


@pytest.mark.parametrize("form", FORMS)
def test_bytes_are_copied_where_the_types_are_the_same(tmp_path, form):
    """Where values that are not finite are allowed, all values are looked at one by one."""
    folder = FORMS[form](tmp_path / "checkpoint", random_weights(LLAMA, "F16"))
    weight_type = FloatType.F32 if "Meta" in form else FloatType.F16  # that of the checkpoint
    convert(folder, tmp_path / "a.m", Settings(weight_type))
    convert(folder, tmp_path / "b.m", Settings(weight_type, allow_non_finite=True))
    assert (tmp_path / "a.m").read_bytes() == (tmp_path / "b.m").read_bytes()


@pytest.mark.parametrize("weight_type", FloatType)
def test_matrices_are_quantised_and_the_rest_is_not(tmp_path, weight_type):
    weights = random_weights(QWEN3)
    convert(write(tmp_path / "checkpoint", QWEN3, weights), tmp_path / "a.m", Settings(weight_type))
    with ModelFile(tmp_path / "a.m") as file:
        v = weights["model.layers.1.self_attn.v_proj.weight"]
        np.testing.assert_array_equal(file.raw("v", 1), quantise(v, weight_type))
        np.testing.assert_array_equal(file.raw("output"), quantise(weights["model.embed_tokens.weight"], weight_type))
        np.testing.assert_array_equal(file.f32("embedding"), weights["model.embed_tokens.weight"])
        np.testing.assert_array_equal(file.f32("q_norm", 0), weights["model.layers.0.self_attn.q_norm.weight"])


def test_the_reference_quantiser_s_bytes_on_request(tmp_path):
    weights = random_weights(LLAMA)
    settings = Settings(FloatType.Q40, reference=True)
    convert(write(tmp_path / "checkpoint", LLAMA, weights), tmp_path / "a.m", settings)
    with ModelFile(tmp_path / "a.m") as file:
        v = weights["model.layers.0.self_attn.v_proj.weight"]
        np.testing.assert_array_equal(file.raw("v", 0), quantize(v, FloatType.Q40))
        assert (file.raw("v", 0) != quantise(v, FloatType.Q40)).any()
    assert read_manifest(tmp_path / "a.m")["quantiser"] == "reference"


def test_importance_goes_to_the_matrix_that_it_names(tmp_path):
    weights = random_weights(LLAMA)
    folder = write(tmp_path / "checkpoint", LLAMA, weights)
    convert(folder, tmp_path / "a.m")
    with ModelFile(tmp_path / "a.m") as file:
        matrices = [info for info in file.tensors() if info.float_type is FloatType.Q40]
    rng = np.random.default_rng(2)
    means = {(info.name, info.layer): rng.random(info.columns, dtype=np.float32) ** 4 for info in matrices}
    write_imatrix(tmp_path / "imatrix", ImportanceMatrix("00", 100, means))
    convert(folder, tmp_path / "a.m", Settings(imatrix=tmp_path / "imatrix"))
    with ModelFile(tmp_path / "a.m") as file:
        for layer in range(2):
            v = weights[f"model.layers.{layer}.self_attn.v_proj.weight"]
            expected = quantise(v, FloatType.Q40, importance=means["v", layer])
            np.testing.assert_array_equal(file.raw("v", layer), expected)
            assert (expected != quantise(v, FloatType.Q40)).any()
    manifest = read_manifest(tmp_path / "a.m")
    assert manifest["quantiser"] == "least error by importance"
    assert [file["name"] for file in manifest["source"]["files"]] == ["config.json", "model.safetensors", "imatrix"]
    other = write(tmp_path / "other", QWEN3, random_weights(QWEN3))
    with pytest.raises(FormatError, match="imatrix: .*another model"):
        convert(other, tmp_path / "b.m", Settings(imatrix=tmp_path / "imatrix"))
    assert not (tmp_path / "b.m").exists()


@pytest.mark.parametrize(
    "settings, quantiser",
    [
        (Settings(FloatType.F32), "none"),
        (Settings(FloatType.F16), "none"),
        (Settings(FloatType.Q80), "reference"),
        (Settings(FloatType.Q40), "least error, some copied"),
        (Settings(FloatType.Q40, reference=True), "reference, some copied"),
    ],
)
def test_the_manifest_tells_how_values_were_rounded(tmp_path, settings, quantiser):
    tensors = model(GGUF, {"blk": "Q4_0"})
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(GGUF, tensors))
    convert(tmp_path / "a.gguf", tmp_path / "a.m", settings)
    assert read_manifest(tmp_path / "a.m")["quantiser"] == quantiser


def test_blocks_that_are_copied_alone(tmp_path):
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(GGUF, model(GGUF, {"blk": "Q4_0", "token_embd": "Q4_0"})))
    for settings in (Settings(), Settings(allow_non_finite=True), Settings(reference=True)):
        convert(tmp_path / "a.gguf", tmp_path / "a.m", settings)
        assert read_manifest(tmp_path / "a.m")["quantiser"] == "copied"


def test_sound_blocks_are_copied_where_others_are_not_finite(tmp_path, monkeypatch):
    monkeypatch.setattr("converter.convert.CHUNK_BYTES", 4 * 64 * 8)  # eight rows of q
    tensors = model(GGUF, "Q4_0")
    name = "blk.0.attn_q.weight"
    kind, shape, raw = tensors[name]
    tensors[name] = kind, shape, np.array(np.inf, "<f2").tobytes() + raw[2:]
    (tmp_path / "a.gguf").write_bytes(gguf_bytes(GGUF, tensors))
    result = convert(tmp_path / "a.gguf", tmp_path / "a.m", Settings(allow_non_finite=True))
    assert result.zeroed.keys() == {name}
    assert read_manifest(tmp_path / "a.m")["quantiser"] == "least error, some copied"
    with ModelFile(tmp_path / "a.m") as file:
        rows = np.frombuffer(raw, np.uint8).reshape(shape[0], -1)
        np.testing.assert_array_equal(file.raw("q", 0)[8:], rows[8:])
        np.testing.assert_array_equal(file.raw("q", 1).tobytes(), tensors["blk.1.attn_q.weight"][2])


@pytest.mark.parametrize("name", ["a.m", "y" * 250 + ".m"], ids=["a folder", "too long"])
def test_a_manifest_that_cannot_be_written_is_found_before_anything_is_read(tmp_path, monkeypatch, name):
    folder = write(tmp_path / "checkpoint", LLAMA, random_weights(LLAMA))
    if name == "a.m":
        (tmp_path / "a.m.json").mkdir()
    before = sorted(tmp_path.iterdir())
    monkeypatch.setattr("converter.convert.read_bytes", lambda path, offset, count: pytest.fail("a file was read"))
    with pytest.raises(FileError, match=r"\.m\.json: "):
        convert(folder, tmp_path / name)
    assert sorted(tmp_path.iterdir()) == before


def test_no_model_without_its_manifest(tmp_path, monkeypatch):
    def full(self, values):
        raise FileError("a.m.json", "cannot be written")

    folder = write(tmp_path / "checkpoint", LLAMA, random_weights(LLAMA))
    monkeypatch.setattr("converter.convert.ManifestWriter.write", full)
    with pytest.raises(FileError, match="a.m.json: cannot be written"):
        convert(folder, tmp_path / "a.m")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


def test_an_output_in_place_of_a_source_is_refused(tmp_path):
    folder = write(tmp_path / "checkpoint", LLAMA, random_weights(LLAMA))
    (tmp_path / "link.m").symlink_to(folder / "model.safetensors")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    for out in (folder / "model.safetensors", tmp_path / "link.m", folder / "config"):  # whose manifest is config.json
        with pytest.raises(FileError, match="is what it would be made from"):
            convert(folder, out)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before


def test_large_tensors_in_chunks_of_whole_heads(tmp_path, monkeypatch):
    monkeypatch.setattr("converter.convert.CHUNK_BYTES", 5000)  # 19 rows: not a multiple of a head's 16
    weights = random_weights(LLAMA)
    convert(write(tmp_path / "checkpoint", LLAMA, weights), tmp_path / "a.m", Settings(FloatType.F32))
    with ModelFile(tmp_path / "a.m") as file:
        q = weights["model.layers.0.self_attn.q_proj.weight"]
        np.testing.assert_array_equal(file.f32("q", 0), interleave_pairs(q, 16))
        np.testing.assert_array_equal(file.f32("output"), weights["lm_head.weight"])


def test_progress_counts_every_byte(tmp_path):
    done = {}

    class Phase:
        def __init__(self, label, total):
            self.label, self.total = label, total

        def __enter__(self):
            done[self.label] = [self.total, 0]
            return self.add

        def add(self, nbytes):
            done[self.label][1] += nbytes

        def __exit__(self, *exception):
            pass

    folder = write(tmp_path / "checkpoint", LLAMA, random_weights(LLAMA), shards=3)
    convert(folder, tmp_path / "a.m", progress=Phase)
    with ModelFile(tmp_path / "a.m") as file:
        written = file.nbytes - file.header_bytes
    assert done == {"Writing a.m": [written, written]}


def test_the_manifest_tells_the_sources_and_their_hashes(tmp_path):
    folder = write_meta(tmp_path / "llama", LLAMA, random_weights(LLAMA), 2)
    convert(folder, tmp_path / "a.m", Settings(FloatType.Q80))
    values = read_manifest(tmp_path / "a.m")
    hashed = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
    assert {file["name"]: file["sha256"] for file in values["source"]["files"]} == hashed
    assert (values["source"]["kind"], values["source"]["name"]) == ("Meta folder", "llama")
    assert (values["weights"], values["quantiser"]) == ("q80", "reference")
    assert values["bytes"] == (tmp_path / "a.m").stat().st_size
    assert str(tmp_path) not in (tmp_path / "a.m.json").read_text()


@pytest.mark.parametrize("form", FORMS)
def test_a_checkpoint_is_read_once(tmp_path, monkeypatch, form):
    """What is read beside the conversion, for the hashes alone, is no tensor; Meta's norms are in every shard."""
    folder = FORMS[form](tmp_path / "checkpoint", random_weights(LLAMA, "F16"))
    beside = []

    def read_beside(path, offset, count):
        beside.append(count)
        return read_bytes(path, offset, count)

    monkeypatch.setattr("converter.hashed.read_bytes", read_beside)
    convert(folder, tmp_path / "a.m")
    total = sum(path.stat().st_size for path in ([folder] if folder.is_file() else folder.iterdir()))
    values = sum(int(np.prod(shape)) for shape in shapes(LLAMA).values())
    assert sum(beside) <= total - values * (4 if "Meta" in form else 2)


def test_a_checkpoint_that_changes_meanwhile(tmp_path, monkeypatch):
    folder = write(tmp_path / "checkpoint", LLAMA, random_weights(LLAMA))

    def changed(rows, *args, **options):
        os.utime(folder / "model.safetensors", ns=(1, 1))
        return quantise(rows, *args, **options)

    monkeypatch.setattr("converter.convert.quantise", changed)
    with pytest.raises(FileError, match="model.safetensors: changed while it was read"):
        convert(folder, tmp_path / "a.m")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.parametrize("weight_type", FloatType)
def test_values_that_are_not_finite_are_zeroed_where_that_is_allowed(tmp_path, monkeypatch, weight_type):
    monkeypatch.setattr("converter.convert.CHUNK_BYTES", 5 * 4 * 64)  # the two values are in chunks of their own
    weights = random_weights(LLAMA)
    name = "model.layers.0.mlp.up_proj.weight"
    weights[name][2, 5], weights[name][7, 60], weights["model.norm.weight"][3] = np.nan, -np.inf, np.inf
    folder = write(tmp_path / "checkpoint", LLAMA, weights)
    with pytest.raises(FormatError, match=r"tensor .* has values that are not finite .*\(--allow-non-finite writes"):
        convert(folder, tmp_path / "a.m", Settings(weight_type))
    result = convert(folder, tmp_path / "a.m", Settings(weight_type, allow_non_finite=True))
    assert result.zeroed == {name: 2, "model.norm.weight": 1}
    expected = {key: np.where(np.isfinite(values), values, np.float32(0)) for key, values in weights.items()}
    convert(write(tmp_path / "zeroed", LLAMA, expected), tmp_path / "b.m", Settings(weight_type))
    assert (tmp_path / "a.m").read_bytes() == (tmp_path / "b.m").read_bytes()


def test_values_that_the_header_cannot_hold(tmp_path):
    folder = write(tmp_path / "checkpoint", {**LLAMA, "rope_theta": 10000.5}, random_weights(LLAMA))
    with pytest.raises(FormatError, match="config.json: rope_theta 10000.5 cannot be stored"):
        convert(folder, tmp_path / "a.m")


def test_a_full_disk_is_found_before_anything_is_read(tmp_path, monkeypatch):
    folder = write(tmp_path / "checkpoint", LLAMA, random_weights(LLAMA))
    usage = type("Usage", (), {"free": 1000})
    monkeypatch.setattr("dllama.formats.files.shutil.disk_usage", lambda path: usage)
    monkeypatch.setattr("converter.convert.read_bytes", lambda path, offset, count: pytest.fail("a file was read"))
    with pytest.raises(FileError, match=r"a.m: the disk is too full: [\d,]+ bytes needed, 1,000 free"):
        convert(folder, tmp_path / "a.m")
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.skipif(not hasattr(resource, "RLIMIT_FSIZE"), reason="needs a limit on the size of files")
def test_a_disk_that_fills_up_leaves_nothing(tmp_path):
    folder = write(tmp_path / "checkpoint", LLAMA, random_weights(LLAMA))
    limit = "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY)); "
    run = f"from converter.cli import main; main(['hf', {str(folder)!r}, '-o', {str(tmp_path / 'a.m')!r}])"
    done = subprocess.run([sys.executable, "-c", limit + run], capture_output=True, text=True)
    assert done.returncode == 1
    assert "a.m: cannot be written: file too large" in done.stderr and "Traceback" not in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint"]


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
@pytest.mark.parametrize("form", ["safetensors", "Meta"])
def test_memory_stays_far_below_the_checkpoint(tmp_path, form):
    """A checkpoint of about 100 MB, its largest tensors 33 MB each; the memory counts mapped files too."""
    config = {**LLAMA, "hidden_size": 1024, "intermediate_size": 2048, "num_hidden_layers": 1, "vocab_size": 8000,
              "num_attention_heads": 8, "num_key_value_heads": 8}  # fmt: skip
    folder = tmp_path / "checkpoint"
    if form == "Meta":
        write_meta(folder, config, {name: np.zeros(shape, "f4") for name, shape in shapes(config).items()}, 2)
    else:
        write_sparse(folder, config, "F32")
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    script = f"""
        import re
        from pathlib import Path
        import numpy as np
        from converter import convert
        from converter.quantise import quantise
        from dllama.formats import FloatType

        def peak_kilobytes():
            return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])

        quantise(np.zeros((1, 64), np.float32), FloatType.Q40)  # compiles
        before = peak_kilobytes()
        convert.THREADS, convert.CHUNK_BYTES = 2, 1 << 20
        convert.convert({str(folder)!r}, {str(tmp_path / "a.m")!r})
        print(peak_kilobytes() - before)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    assert int(done.stdout) << 10 < 25 << 20 < 90 << 20 < nbytes
