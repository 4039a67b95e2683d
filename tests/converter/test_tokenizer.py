import json

import pytest

from converter.tokenizer import convert_tokenizer
from dllama.errors import FileError, FormatError
from dllama.formats.vocabulary import read_t, write_bin
from tests.tokenizer.models import train


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return train(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=400)


@pytest.fixture
def folder(tmp_path, model):
    path = tmp_path / "checkpoint"
    path.mkdir()
    (path / "tokenizer.model").write_bytes(model.read_bytes())
    return path


def test_a_model_a_bin_file_and_a_t_file_give_the_same(tmp_path, model):
    vocabulary = convert_tokenizer(model, tmp_path / "a.t")
    write_bin(tmp_path / "tokenizer.bin", vocabulary)
    assert convert_tokenizer(tmp_path / "tokenizer.bin", tmp_path / "b.t") == vocabulary
    assert convert_tokenizer(tmp_path / "a.t", tmp_path / "c.t") == vocabulary
    assert (tmp_path / "a.t").read_bytes() == (tmp_path / "b.t").read_bytes() == (tmp_path / "c.t").read_bytes()
    assert read_t(tmp_path / "a.t") == vocabulary


def test_a_folder_brings_its_chat_template_and_eos_ids(tmp_path, folder):
    (folder / "config.json").write_text(json.dumps({"vocab_size": 400, "eos_token_id": 2}))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 7]}))
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "{{ messages }}"}))
    vocabulary = convert_tokenizer(folder, tmp_path / "a.t")
    assert (vocabulary.eos_ids, vocabulary.chat_template) == ((2, 7), "{{ messages }}")
    assert read_t(tmp_path / "a.t") == vocabulary


def test_a_chat_template_may_lie_in_a_file_of_its_own(tmp_path, folder):
    (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": "older"}))
    (folder / "chat_template.jinja").write_text("{{ newer }} é", encoding="utf-8")
    assert convert_tokenizer(folder, tmp_path / "a.t").chat_template == "{{ newer }} é"
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(FormatError, match="chat_template.jinja: not UTF-8 text"):
        convert_tokenizer(folder, tmp_path / "b.t")


def test_a_folder_with_a_model_alone(tmp_path, folder, model):
    assert convert_tokenizer(folder, tmp_path / "a.t") == convert_tokenizer(model, tmp_path / "b.t")


@pytest.mark.parametrize(
    "name, content, reason",
    [
        ("config.json", {"vocab_size": 401}, "400 tokens, and config.json says 401: added tokens are not supported"),
        ("config.json", {"eos_token_id": 400}, "eos id 400 is outside the vocabulary"),
        ("generation_config.json", [], "generation_config.json: not a JSON object"),
    ],
)
def test_folders_refused_with_the_reason(tmp_path, folder, name, content, reason):
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(FormatError, match=reason):
        convert_tokenizer(folder, tmp_path / "a.t")
    assert not (tmp_path / "a.t").exists()


def test_what_is_not_supported_yet(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}    ")
    with pytest.raises(FileError, match="tokenizer.json: a tokenizer.json is not supported yet"):
        convert_tokenizer(tmp_path / "tokenizer.json", tmp_path / "a.t")
    with pytest.raises(FileError, match="tokenizer.json: not supported yet, and there is no tokenizer.model"):
        convert_tokenizer(tmp_path, tmp_path / "a.t")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="empty: holds no tokenizer.model"):
        convert_tokenizer(tmp_path / "empty", tmp_path / "a.t")
    with pytest.raises(FileError, match="missing: no such file"):
        convert_tokenizer(tmp_path / "missing", tmp_path / "a.t")
