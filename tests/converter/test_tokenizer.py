import base64
import json

import pytest

from converter.tokenizer import convert_tokenizer
from dllama.errors import FileError, FormatError
from dllama.formats.vocabulary import read_t, write_bin
from dllama.tokenizer import load_tokenizer
from tests.converter.corpus import CORPUS, recorded
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
        (
            "config.json",
            {"vocab_size": 401},
            "400 tokens, and config.json says 401: there is no tokenizer.json with more",
        ),
        ("config.json", {"eos_token_id": 400}, "eos id 400 is outside the vocabulary"),
        ("generation_config.json", [], "generation_config.json: not a JSON object"),
        ("tokenizer_config.json", {"chat_template": "\ud800"}, "checkpoint: the chat template is not valid Unicode"),
    ],
)
def test_folders_refused_with_the_reason(tmp_path, folder, name, content, reason):
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(FormatError, match=reason):
        convert_tokenizer(folder, tmp_path / "a.t")
    assert not (tmp_path / "a.t").exists()


def test_folders_and_files_that_hold_no_tokenizer(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}    ")
    with pytest.raises(FileError, match="tokenizer.json: model is missing"):
        convert_tokenizer(tmp_path / "tokenizer.json", tmp_path / "a.t")
    with pytest.raises(FileError, match="tokenizer.json: model is missing"):
        convert_tokenizer(tmp_path, tmp_path / "a.t")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileError, match="empty: holds neither tokenizer.model nor tokenizer.json"):
        convert_tokenizer(tmp_path / "empty", tmp_path / "a.t")
    with pytest.raises(FileError, match="missing: no such file"):
        convert_tokenizer(tmp_path / "missing", tmp_path / "a.t")


@pytest.fixture
def qwen_folder(tmp_path):
    """As Qwen 3 is published, but for its size: settings, and a model with more rows than the tokenizer has tokens."""
    path = tmp_path / "qwen"
    path.mkdir()
    values, _ = recorded("qwen3")
    first = len(values["model"]["vocab"])
    (path / "tokenizer.json").write_text(json.dumps(values))
    (path / "config.json").write_text(
        json.dumps({"vocab_size": first + 20, "bos_token_id": first, "eos_token_id": first + 2})
    )
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [first + 2, first]}))
    template = [{"name": "tool_use", "template": "other"}, {"name": "default", "template": "{{ messages }}"}]
    settings = {"bos_token": None, "eos_token": {"content": "<|im_end|>"}, "chat_template": template}
    (path / "tokenizer_config.json").write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("name", ["", "tokenizer.json"])
def test_a_tokenizer_json_and_the_files_beside_it(tmp_path, qwen_folder, name):
    vocabulary = convert_tokenizer(qwen_folder / name, tmp_path / "a.t")
    first = vocabulary.bos_id
    assert vocabulary.pieces[first] == b"<|endoftext|>" and len(vocabulary.pieces) == first + 20
    assert (vocabulary.eos_ids, vocabulary.add_bos) == ((first + 2, first), False)
    assert vocabulary.chat_template == "{{ messages }}"
    assert read_t(tmp_path / "a.t") == vocabulary
    _, ids = recorded("qwen3")
    tokenizer = load_tokenizer(tmp_path / "a.t")
    assert {key: tokenizer.encode(text, special=True) for key, text in CORPUS.items()} == ids


def test_a_tokenizer_json_with_more_tokens_comes_before_the_model(tmp_path, folder):
    values, _ = recorded("llama2")
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert len(convert_tokenizer(folder, tmp_path / "a.t").pieces) == 400
    (folder / "config.json").write_text(json.dumps({"vocab_size": 400}))
    assert len(convert_tokenizer(folder, tmp_path / "a.t").pieces) == 400
    (folder / "config.json").write_text(json.dumps({"vocab_size": 700}))
    assert len(convert_tokenizer(folder, tmp_path / "a.t").pieces) == 700


def test_a_vocabulary_size_that_is_no_number(tmp_path, qwen_folder):
    (qwen_folder / "config.json").write_text(json.dumps({"vocab_size": "many"}))
    with pytest.raises(FormatError, match="config.json: vocab_size is 'many', not a whole number"):
        convert_tokenizer(qwen_folder, tmp_path / "a.t")


def test_llama_3_s_own_tokenizer_model(tmp_path):
    lines = [base64.b64encode(bytes([byte])) + b" %d\n" % byte for byte in range(256)]
    (tmp_path / "tokenizer.model").write_bytes(b"".join(lines))
    by_folder = convert_tokenizer(tmp_path, tmp_path / "a.t")
    assert by_folder == convert_tokenizer(tmp_path / "tokenizer.model", tmp_path / "b.t")
    assert len(by_folder.pieces) == 512
