"""`dllama info` on sound files, damaged ones, and what is no such file at all."""

import json
import os
import struct

import pytest

from dllama.engine.memory import in_units, needed_bytes
from dllama.formats import FloatType
from dllama.formats.manifest import read_manifest, write_manifest
from tests.cli.conftest import CONFIG
from tests.cli.program import fails, succeeds


def test_a_model_as_json(small_model):
    values = json.loads(succeeds("info", small_model, "--json", "--context", "64,128", "--nodes", "1,2"))
    assert values["model"]["dim"] == CONFIG.dim
    assert values["model"]["arch"] == "llama"
    assert values["model"]["weight_type"] == "q40"
    assert values["bytes"] == small_model.stat().st_size
    assert 0 < values["bytes"] - sum(values["parts"].values()) < 200  # the header
    assert values["parameters"] == 2 * 300 * 64 + 2 * (2 * 64 * 64 + 2 * 32 * 64 + 3 * 64 * 96 + 2 * 64) + 64
    assert values["memory"] == [
        {"context": context, "nodes": nodes, "bytes": needed_bytes(CONFIG, context, FloatType.F16, nodes)}
        for context in (64, 128)
        for nodes in (1, 2)
    ]


def test_a_model_as_a_table(small_model):
    lines = succeeds("info", small_model, "--nodes", "1,4").splitlines()
    assert lines[0] == f"{small_model}: 100,160 parameters, 124 kB"
    rows = [" ".join(line.split()) for line in lines]
    assert "hidden dim 96" in rows
    assert "kv heads 2" in rows
    assert f"embedding 77 kB {100 * 300 * 64 * 4 / small_model.stat().st_size:.1f} %" in rows
    assert "context 1 node 4 nodes" in rows
    needed = [in_units(needed_bytes(CONFIG, 128, FloatType.F16, nodes)) for nodes in (1, 4)]
    assert f"128 {needed[0]} {needed[1]}" in rows


def test_where_a_model_came_from(tmp_path, small_model):
    model = tmp_path / "a.m"
    model.write_bytes(small_model.read_bytes())
    assert json.loads(succeeds("info", model, "--json"))["manifest"] is None
    files = [
        {"name": "params.json", "bytes": 98, "sha256": "0a" * 32},
        {"name": "w.pth", "bytes": 5, "sha256": "1b" * 32},
    ]
    manifest = {
        "source": {"kind": "Meta folder", "name": "llama", "files": files}, "weights": "q40", "quantiser": "reference",
        "converter": "dllama 0.1",
    }  # fmt: skip
    write_manifest(model, manifest)
    assert json.loads(succeeds("info", model, "--json"))["manifest"] == read_manifest(model)
    lines = [" ".join(line.split()) for line in succeeds("info", model).splitlines()]
    assert "Converted from the Meta folder llama by dllama 0.1, q40 by reference" in lines
    assert f"params.json 98 bytes sha256 {'0a' * 32}" in lines
    model.write_bytes(small_model.read_bytes()[:-1] + b"x")
    assert "Converted" not in succeeds("info", model)


def test_a_context_beyond_the_model(small_model):
    message = fails("info", small_model, "--context", "64,129")
    assert message == f"{small_model}: the model's context is 128 tokens, and 129 were asked for"


def test_a_tokenizer(embedded):
    values = json.loads(succeeds("info", embedded.tokenizer, "--json"))
    assert values["vocabulary"] > 256
    rows = [line.split() for line in succeeds("info", embedded.tokenizer).splitlines()]
    assert ["kind", values["kind"]] in rows
    assert ["vocabulary", str(values["vocabulary"])] in rows


def test_old_magic(tmp_path):
    old = tmp_path / "old.bin"
    old.write_bytes(struct.pack("<10i", 0x00ABCD00, *[1] * 9))
    message = fails("info", old)
    assert message.startswith(f"{old}: a model with the old header")


@pytest.mark.parametrize(("change", "word"), [(-1, "truncated"), (1, "oversized")])
def test_a_model_of_another_length(small_model, tmp_path, change, word):
    damaged = tmp_path / "damaged.m"
    damaged.write_bytes((small_model.read_bytes() + b"x")[: small_model.stat().st_size + change])
    assert fails("info", damaged).startswith(f"{damaged}: {word}: ")


def test_other_files(tmp_path):
    text = tmp_path / "notes.txt"
    text.write_text("nothing of the kind")
    assert fails("info", text).startswith(f"{text}: not a tokenizer")
    model = tmp_path / "notes.m"
    model.write_text("nothing of the kind")
    assert fails("info", model).startswith(f"{model}: not a model")
    empty = tmp_path / "empty"
    empty.touch()
    assert fails("info", empty).startswith(f"{empty}: ")
    assert fails("info", tmp_path) == f"{tmp_path}: a folder, not a file"
    assert fails("info", tmp_path / "none.m") == f"{tmp_path / 'none.m'}: no such file or folder"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(small_model, tmp_path):
    closed = tmp_path / "closed.m"
    closed.write_bytes(small_model.read_bytes())
    closed.chmod(0)
    assert fails("info", closed) == f"{closed}: permission denied"
