"""`dllama key`: what it prints, and what it never prints."""

import json

import pytest

from dllama.cluster import key as cluster_key
from tests.cli.program import fails, succeeds


@pytest.fixture
def home(tmp_path):
    """The environment of a user without any key yet."""
    return {"XDG_CONFIG_HOME": str(tmp_path / "config"), "HOME": str(tmp_path), "DLLAMA_KEY_FILE": ""}


@pytest.fixture
def path(tmp_path):
    return tmp_path / "config" / "dllama" / "cluster.key"


def test_a_key_is_made_once(home, path):
    lines = succeeds("key", "make", **home).splitlines()
    made = cluster_key.load(path)
    assert lines == [
        f"{path}: new cluster key, {made.fingerprint}",
        f"to copy it to another device, type there: {cluster_key.copy_command(path)}",
    ]
    assert fails("key", "make", **home) == f"{path}: exists already; 'dllama key rotate' puts a new key in its place"
    assert cluster_key.load(path) == made


def test_the_secret_is_shown_only_when_asked_for(home, path):
    made = cluster_key.create(path)
    shown = [succeeds("key", "show", **home), succeeds("key", "show", "--json", **home)]
    assert shown[0] == f"{path}: cluster key {made.fingerprint}\n"
    assert json.loads(shown[1]) == {"file": str(path), "fingerprint": made.fingerprint}
    assert not any(half.decode() in text for half in made for text in shown)
    values = json.loads(succeeds("key", "show", "--json", "--secret", **home))
    assert values["secret"] == made.secret.decode() and values["public"] == made.public.decode()


def test_what_show_prints_is_a_key_file(home, path, tmp_path):
    made = cluster_key.create(path)
    copy = tmp_path / "copy.key"
    copy.touch(mode=0o600)
    copy.write_text(succeeds("key", "show", "--secret", **home))
    assert cluster_key.load(copy) == made


def test_rotating_makes_another_key(home, path):
    old = cluster_key.create(path)
    text = succeeds("key", "rotate", **home)
    new = cluster_key.load(path)
    assert new != old
    assert text.startswith(f"{path}: new cluster key in place of the old one, {new.fingerprint}\n")
    assert not any(half.decode() in text for half in (*new, *old))


def test_another_file(home, path, tmp_path):
    lab, desk = tmp_path / "lab.key", tmp_path / "desk.key"
    succeeds("key", "make", "--key-file", lab, **home)
    succeeds("key", "make", **home | {"DLLAMA_KEY_FILE": str(desk)})
    assert not path.exists()
    assert cluster_key.load(lab).fingerprint in succeeds("key", "show", **home | {"DLLAMA_KEY_FILE": str(lab)})
    assert cluster_key.load(desk).fingerprint in succeeds("key", "show", "--key-file", desk, **home)


def test_a_key_that_cannot_be_used(home, path):
    assert fails("key", "show", **home).startswith(f"{path}: no such file or folder; copy it from a device that has it")
    cluster_key.create(path)
    path.chmod(0o644)
    message = f"{path}: this cluster key is open to other users of the device; first: chmod 600 {path}"
    assert fails("key", "show", **home) == message
    assert fails("key", "rotate", **home) == message


def test_help_without_a_command():
    assert succeeds("key") == succeeds("key", "--help")
    for name in ("show", "make", "rotate"):
        assert f"\n  {name} " in succeeds("key")
        assert f"\n    dllama key {name}" in succeeds("key", name, "--help")
