"""Key files: made, read, refused, replaced."""

import os
import stat
import subprocess

import pytest

from dllama.cluster import key
from dllama.cluster.key import ClusterKey, copy_command, create, generate, key_path, load, load_or_create, rotate
from dllama.errors import ClusterKeyError


def mode(path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_a_new_key_is_read_back_and_closed_to_others(tmp_path):
    path = tmp_path / "dllama" / "cluster.key"
    made = create(path)
    assert load(path) == made
    assert mode(path) == 0o600
    assert mode(path.parent) == 0o700
    assert list(path.parent.iterdir()) == [path]


def test_modes_do_not_depend_on_the_umask(tmp_path):
    for umask in (0, 0o077, 0o002):
        before = os.umask(umask)
        try:
            create(tmp_path / f"{umask}.key")
        finally:
            os.umask(before)
        assert mode(tmp_path / f"{umask}.key") == 0o600


def test_no_two_keys_are_the_same():
    keys = [generate() for _ in range(50)]
    assert len(set(keys)) == len({made.fingerprint for made in keys}) == 50


def test_nothing_is_overwritten(tmp_path):
    path = tmp_path / "cluster.key"
    path.write_text("my notes")
    path.chmod(0o600)
    for write in (create, rotate, load_or_create):
        with pytest.raises(ClusterKeyError, match="cluster.key: "):
            write(path)
    assert path.read_text() == "my notes"
    assert list(tmp_path.iterdir()) == [path]


def test_a_link_to_nowhere_is_not_followed(tmp_path):
    path = tmp_path / "cluster.key"
    path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ClusterKeyError, match="exists already"):
        create(path)
    with pytest.raises(ClusterKeyError, match="no such file"):
        load_or_create(path)
    assert not (tmp_path / "nowhere").exists()


def test_a_key_is_made_where_hard_links_are_not_allowed(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    made = create(tmp_path / "cluster.key")
    assert load(tmp_path / "cluster.key") == made
    with pytest.raises(ClusterKeyError, match="exists already"):
        create(tmp_path / "cluster.key")
    assert load(tmp_path / "cluster.key") == made


def test_the_first_start_makes_a_key_and_the_second_finds_it(tmp_path):
    path = tmp_path / "cluster.key"
    made, new = load_or_create(path)
    assert new
    assert load_or_create(path) == (made, False)


def test_rotating_leaves_nothing_of_the_old_key(tmp_path):
    path, link = tmp_path / "cluster.key", tmp_path / "link.key"
    old = create(path)
    link.symlink_to(path)
    new = rotate(link)
    assert new != old
    assert load(path) == new
    assert link.is_symlink() and mode(path) == 0o600
    assert set(tmp_path.iterdir()) == {path, link}
    assert old.secret not in path.read_bytes()


def test_rotating_needs_a_key(tmp_path):
    with pytest.raises(ClusterKeyError, match="no such file or folder; copy it from a device that has it, or 'dllama"):
        rotate(tmp_path / "cluster.key")


@pytest.mark.parametrize("loose", [0o640, 0o604, 0o660, 0o610, 0o644, 0o777])
def test_a_key_that_is_open_to_others_is_refused_with_the_command_that_closes_it(tmp_path, loose):
    path = tmp_path / "a key"
    create(path)
    path.chmod(loose)
    with pytest.raises(ClusterKeyError, match="open to other users") as error:
        load(path)
    command = str(error.value).partition("first: ")[2]
    subprocess.run(command, shell=True, check=True)
    load(path)


def test_a_key_of_another_user_is_refused(tmp_path, monkeypatch):
    path = tmp_path / "cluster.key"
    create(path)
    monkeypatch.setattr(os, "geteuid", lambda: path.stat().st_uid + 1)
    with pytest.raises(ClusterKeyError, match="belongs to another user"):
        load(path)


A, B = generate(), generate()


@pytest.mark.parametrize(
    "content, reason",
    [
        (b"", "no cluster key"),
        (b"\x7fELF\x00\xff\xfe", "no cluster key"),
        (b"public = %s\n" % A.public, "no cluster key"),
        (A.text.encode() + b"more = 1\n", "no cluster key"),
        (A.text.encode().replace(b"secret", b"Secret"), "no cluster key"),
        (A.text.encode() + b"#" * 5000, "no cluster key"),
        (A.text.encode()[:-2], "40 characters"),
        (A.text.encode().replace(A.public, A.public[:-1] + b"~"), "40 characters"),
        (A.text.encode().replace(A.public, b"\xc3\xa4" * 20), "40 characters"),
        (ClusterKey(A.public, B.secret).text.encode(), "do not belong together"),
        (ClusterKey(A.secret, A.public).text.encode(), "do not belong together"),
    ],
)
def test_a_damaged_key_is_refused_without_showing_it(tmp_path, content, reason):
    path = tmp_path / "cluster.key"
    path.write_bytes(content)
    path.chmod(0o600)
    with pytest.raises(ClusterKeyError, match=f"cluster.key: .*{reason}") as error:
        load(path)
    assert A.secret.decode() not in str(error.value)


def test_line_ends_spaces_and_comments_do_not_matter(tmp_path):
    path = tmp_path / "cluster.key"
    path.write_bytes(A.text.replace("\n", " \r\n\r\n").replace(" = ", "=").encode() + b"# a note\n")
    path.chmod(0o600)
    assert load(path) == A


def test_files_that_cannot_be(tmp_path):
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path, "a folder, not a file"),
        (tmp_path / "file" / "cluster.key", "a part of the path is not a folder"),
        (tmp_path / ("a" * 256), "file name too long"),
        ("/dev/null", "not a regular file"),
    ):
        with pytest.raises(ClusterKeyError, match=reason):
            load(path)
    with pytest.raises(ClusterKeyError, match="cannot be written: a part of the path is not a folder"):
        create(tmp_path / "file" / "cluster.key")
    with pytest.raises(ClusterKeyError, match="cannot be written: a part of the path is not a folder"):
        create(tmp_path / "file" / "deeper" / "cluster.key")


def test_where_the_key_is(tmp_path, monkeypatch):
    monkeypatch.delenv("DLLAMA_KEY_FILE", raising=False)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    monkeypatch.setattr("sys.platform", "linux")
    assert key_path() == tmp_path / "dllama" / "cluster.key"
    monkeypatch.setenv("DLLAMA_KEY_FILE", "lab.key")
    assert str(key_path()) == "lab.key"
    assert str(key_path("other.key")) == "other.key"
    monkeypatch.delenv("DLLAMA_KEY_FILE")
    monkeypatch.delenv("XDG_CONFIG_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert key_path() == tmp_path / ".config" / "dllama" / "cluster.key"
    monkeypatch.setattr("sys.platform", "darwin")
    assert key_path() == tmp_path / "Library" / "Application Support" / "dllama" / "cluster.key"


def test_a_key_does_not_show_itself(tmp_path):
    assert A.secret.decode() not in repr(A) and A.public.decode() not in repr(A)
    assert A.fingerprint in repr(A)


def test_the_command_that_copies_a_key_names_this_device_and_file(tmp_path):
    command = copy_command(tmp_path / "cluster.key")
    assert f":{tmp_path / 'cluster.key'} " in command
    assert key.FILE_NAME in command.split()[-1]
