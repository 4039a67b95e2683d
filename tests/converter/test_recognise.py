import errno

import pytest

from converter.recognise import open_checkpoint, recognise
from dllama.errors import FileError
from dllama.formats import FloatType
from tests.converter.checkpoints import LLAMA, random_weights, write, write_meta


def test_folders_by_what_they_hold(tmp_path):
    hf = write(tmp_path / "hf", LLAMA, random_weights(LLAMA))
    meta = write_meta(tmp_path / "meta", LLAMA, random_weights(LLAMA))
    assert (recognise(hf), recognise(meta)) == ("hf", "meta")
    assert open_checkpoint(hf, FloatType.Q40).kind == "Hugging Face folder"
    assert open_checkpoint(meta, FloatType.Q40, 64).config.seq_len == 64
    (meta / "params.json").unlink()
    assert recognise(meta) == "meta"
    with pytest.raises(FileError, match="params.json: no such file"):
        open_checkpoint(meta, FloatType.Q40)


def test_a_folder_that_holds_both_is_read_as_hugging_face_s(tmp_path):
    weights = random_weights(LLAMA)
    assert recognise(write(write_meta(tmp_path / "both", LLAMA, weights), LLAMA, weights)) == "hf"


@pytest.mark.parametrize("form", ["hf", "meta"])
def test_a_form_that_is_given_counts(tmp_path, form):
    weights = random_weights(LLAMA)
    folder = write(write_meta(tmp_path / "both", LLAMA, weights), LLAMA, weights)
    kind = {"hf": "Hugging Face folder", "meta": "Meta folder"}[form]
    assert open_checkpoint(folder, FloatType.Q40, form=form).kind == kind


def test_what_is_no_checkpoint(tmp_path):
    with pytest.raises(FileError, match="missing: no such file or folder"):
        recognise(tmp_path / "missing")
    (tmp_path / "file").write_bytes(b"GG")
    for path in (tmp_path, tmp_path / "file"):
        with pytest.raises(FileError, match=r"not a checkpoint: known are GGUF files, Hugging Face folders"):
            recognise(path)
    for form in ("hf", "meta"):
        with pytest.raises(FileError, match="no such file|not a folder"):
            open_checkpoint(tmp_path / "missing", FloatType.Q40, form=form)
        with pytest.raises(FileError, match="not a folder"):
            open_checkpoint(tmp_path / "file", FloatType.Q40, form=form)


def test_a_folder_that_may_not_be_read(tmp_path, monkeypatch):
    def forbidden(path):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr("converter.checkpoint.os.listdir", forbidden)
    for form in (None, "meta"):
        with pytest.raises(FileError, match="permission denied"):
            open_checkpoint(tmp_path, FloatType.Q40, form=form)
