import hashlib
import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dllama.errors import FileError, FormatError
from dllama.formats.manifest import ManifestWriter, manifest_path, read_manifest, write_manifest

SOURCE = {"kind": "Meta folder", "name": "llama-2-7b", "files": [{"name": "params.json", "bytes": 9, "sha256": "ab"}]}
VALUES = {"source": SOURCE, "weights": "q40", "quantiser": "reference", "converter": "dllama 1"}
WHOLE = {"bytes": 4, "tail_sha256": hashlib.sha256(b"1234").hexdigest()} | VALUES


@pytest.fixture
def model(tmp_path):
    path = tmp_path / "a.m"
    path.write_bytes(b"1234")
    return path


def test_what_is_written_comes_back(model):
    assert read_manifest(model) is None
    write_manifest(model, VALUES)
    assert manifest_path(model) == model.with_name("a.m.json")
    assert read_manifest(model) == WHOLE


@pytest.mark.parametrize("other", [b"12345", b"1235", b""])
def test_a_manifest_of_another_file(model, other):
    write_manifest(model, VALUES)
    model.write_bytes(other)
    with pytest.raises(FormatError, match="a.m.json: not the manifest of a.m, but of another model"):
        read_manifest(model)


def test_the_end_of_the_file_tells_it_from_others(model):
    model.write_bytes(bytes(3 << 20) + b"1")
    write_manifest(model, VALUES)
    model.write_bytes(bytes(3 << 20) + b"2")
    with pytest.raises(FormatError, match="of another model"):
        read_manifest(model)


def test_a_manifest_that_cannot_be_written(model):
    manifest_path(model).mkdir()
    with pytest.raises(FileError, match="a.m.json: exists and is not a regular file"):
        write_manifest(model, VALUES)


def test_a_place_is_taken_and_left_as_it_was(model):
    manifest_path(model).write_text("before")
    with pytest.raises(ZeroDivisionError), ManifestWriter(model):
        assert len(list(model.parent.iterdir())) == 3
        raise ZeroDivisionError
    assert manifest_path(model).read_text() == "before" and len(list(model.parent.iterdir())) == 2


def test_names_that_are_not_utf_8(model):
    """As Python hands on names of files in another encoding."""
    values = VALUES | {"source": SOURCE | {"name": os.fsdecode(b"l\xe9o")}}
    write_manifest(model, values)
    assert read_manifest(model) == WHOLE | values


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=3)),
    lambda inner: st.one_of(st.lists(inner, max_size=2), st.dictionaries(st.text(max_size=3), inner, max_size=2)),
    max_leaves=4,
)


@given(
    data=st.one_of(
        st.binary(max_size=30),
        json_values.map(lambda value: json.dumps(value).encode()),
        st.dictionaries(st.sampled_from(list(WHOLE)), json_values).map(lambda new: json.dumps(WHOLE | new).encode()),
        st.dictionaries(st.sampled_from(list(SOURCE)), json_values).map(
            lambda new: json.dumps(WHOLE | {"source": SOURCE | new}).encode()
        ),
    )
)
def test_any_bytes_give_a_manifest_or_a_format_error(tmp_path_factory, data):
    model = tmp_path_factory.mktemp("fuzz") / "a.m"
    model.write_bytes(b"1234")
    manifest_path(model).write_bytes(data)
    try:
        values = read_manifest(model)
    except FormatError:
        return
    assert all(isinstance(file["sha256"], str) for file in values["source"]["files"])


def test_nesting_and_size_have_limits(model):
    for data in (b"[" * 100_000, b" " * (5 << 20)):
        manifest_path(model).write_bytes(data)
        with pytest.raises(FormatError, match="not a model's manifest"):
            read_manifest(model)
