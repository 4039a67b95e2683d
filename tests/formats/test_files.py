import os
import stat
import subprocess
import sys
import textwrap

import pytest

from dllama.errors import FileError
from dllama.formats.files import AtomicFile, open_regular, refuse_overwriting


def test_a_pipe_is_refused_without_waiting_for_a_writer(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FileError, match="pipe: not a regular file"):
        open_regular(tmp_path / "pipe")


@pytest.mark.parametrize("path, reason", [("a\0b", "not a path"), ("/dev/null", "not a regular file")])
def test_paths_that_are_no_files(path, reason):
    with pytest.raises(FileError, match=reason):
        open_regular(path)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_without_permission(tmp_path):
    (tmp_path / "a").touch(mode=0)
    with pytest.raises(FileError, match="a: permission denied"):
        open_regular(tmp_path / "a")


def test_an_output_that_is_a_source_is_refused(tmp_path):
    source = tmp_path / "source"
    source.touch()
    (tmp_path / "link").symlink_to(source)
    os.link(source, tmp_path / "twin")
    for name in ("source", "link", "twin"):
        with pytest.raises(FileError, match=f"{name}: is what it would be made from"):
            refuse_overwriting(tmp_path / name, [tmp_path / "missing", source])
    (tmp_path / "other").touch()
    refuse_overwriting(tmp_path / "other", [tmp_path / "missing", source])
    refuse_overwriting(tmp_path / "missing", [tmp_path / "missing", source])


def test_a_file_appears_when_it_is_complete(tmp_path):
    path = tmp_path / "a"
    with AtomicFile(path, 6) as file:
        file.write(b"abc")
        assert not path.exists()
        file.write(memoryview(b"def"))
    assert path.read_bytes() == b"abcdef"
    assert list(tmp_path.iterdir()) == [path]


def test_a_long_file_leaves_the_memory_while_it_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("dllama.formats.files.WRITE_BEHIND", 10_000)
    parts = [os.urandom(4096) for _ in range(20)]
    with AtomicFile(tmp_path / "a", 20 * 4096) as file:
        for i in (*range(10, 20), *range(10)):
            file.seek(i * 4096)
            file.write(parts[i])
    assert (tmp_path / "a").read_bytes() == b"".join(parts)


def test_a_file_that_is_left_when_the_program_ends(tmp_path):
    """As by a signal that comes before the ``with`` statement; what a child process leaves is its parent's."""
    script = f"""
        import os, sys
        from dllama.formats.files import AtomicFile
        file = AtomicFile({str(tmp_path / "a")!r}, 0)
        child = os.fork()
        if child:
            os.waitpid(child, 0)
            assert len(os.listdir({str(tmp_path)!r})) == 1
        sys.exit(7)
    """
    assert subprocess.run([sys.executable, "-c", textwrap.dedent(script)]).returncode == 7
    assert list(tmp_path.iterdir()) == []


def test_a_written_file_has_the_mode_of_any_new_file(tmp_path):
    (tmp_path / "plain").touch()
    with AtomicFile(tmp_path / "a", 0):
        pass
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == stat.S_IMODE((tmp_path / "plain").stat().st_mode)


def test_aborting_twice_or_after_the_end_changes_nothing(tmp_path):
    file = AtomicFile(tmp_path / "a", 3)
    file.abort()
    file.abort()
    assert list(tmp_path.iterdir()) == []
    file = AtomicFile(tmp_path / "a", 3)
    file.write(b"abc")
    file.commit()
    file.abort()
    assert (tmp_path / "a").read_bytes() == b"abc"


def test_a_name_as_long_as_names_may_be(tmp_path):
    path = tmp_path / ("a" * 255)
    with AtomicFile(path, 1) as file:
        file.write(b"x")
    assert path.read_bytes() == b"x"


def test_targets_that_cannot_be_are_refused_before_anything_is_written(tmp_path):
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    (tmp_path / "file").touch()
    for path, reason in (
        (tmp_path / ("a" * 256), "cannot be written: file name too long"),
        (tmp_path / "circle", "cannot be written: too many levels of symbolic links"),
        (tmp_path / "file" / "a", "cannot be written: a part of the path is not a folder"),
        (tmp_path / "missing" / "a", "cannot be written: no such file or folder"),
        (tmp_path, "exists and is not a regular file"),
    ):
        with pytest.raises(FileError, match=reason):
            AtomicFile(path, 1)
    assert {path.name for path in tmp_path.iterdir()} == {"circle", "file"}
