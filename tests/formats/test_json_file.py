import pytest

from dllama.errors import FileError, FormatError
from dllama.formats import json_file
from dllama.formats.json_file import read_json


def test_an_object(tmp_path):
    (tmp_path / "a.json").write_text('{"a": [1, {"b": null}]}')
    assert read_json(tmp_path / "a.json") == {"a": [1, {"b": None}]}


@pytest.mark.parametrize("text", ["[1]", "{", '{"a": 1, "a": 2}', "\udcff", "[" * 100_000])
def test_anything_else_is_refused_by_name(tmp_path, text):
    (tmp_path / "a.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(FormatError, match="a.json: (not|a appears twice)"):
        read_json(tmp_path / "a.json")


def test_a_file_of_any_size_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr(json_file, "MAX_JSON_BYTES", 5)
    (tmp_path / "a.json").write_text('{"a":1}')
    with pytest.raises(FormatError, match="larger than 5 bytes"):
        read_json(tmp_path / "a.json")


def test_a_missing_file(tmp_path):
    with pytest.raises(FileError, match="config.json: no such file"):
        read_json(tmp_path / "config.json")
