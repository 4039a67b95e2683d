"""Digests of models: the same for the same bytes, remembered, and never for a file that has changed."""

import hashlib
import os
import shutil
from dataclasses import replace

import pytest
from hypothesis import given

from dllama.cluster import digest as module
from dllama.cluster.digest import model_digest, require_unchanged, slice_label, slice_name, unchanged
from dllama.cluster.planner import make_plan
from dllama.errors import FileError
from dllama.formats import ModelFile
from tests.cluster.models import TINY, equal_nodes
from tests.cluster.test_share import plans
from tests.formats.models import write_random


@pytest.fixture(autouse=True)
def notes(tmp_path, monkeypatch):
    """Where digests are remembered."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    return tmp_path / "home" / "dllama" / "digests"


@pytest.fixture
def path(tmp_path):
    write_random(tmp_path / "a.m", TINY)
    return tmp_path / "a.m"


def digest_of(path) -> tuple[bytes, list]:
    """The digest, and the progress reports that tell whether the file was read."""
    reports = []
    with ModelFile(path) as model:
        return model_digest(model, lambda *report: reports.append(report)), reports


def test_a_digest_is_remembered(path):
    first, reports = digest_of(path)
    assert reports[-1] == (path.stat().st_size, path.stat().st_size)
    assert digest_of(path) == (first, [])
    (path.parent / "link.m").symlink_to(path)
    assert digest_of(path.parent / "link.m") == (first, [])


def test_the_same_bytes_elsewhere_have_the_same_digest(path, tmp_path):
    shutil.copy(path, tmp_path / "b.m")
    found, reports = digest_of(tmp_path / "b.m")
    assert found == digest_of(path)[0]
    assert reports


def test_a_changed_file_has_another_digest(path, tmp_path):
    before, stat = digest_of(path)[0], path.stat()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)  # the same inode
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    changed = digest_of(path)[0]
    assert changed != before
    write_random(tmp_path / "new.m", TINY, seed=2)
    os.utime(tmp_path / "new.m", ns=(stat.st_atime_ns, stat.st_mtime_ns + 1))
    os.replace(tmp_path / "new.m", path)  # the same size and time
    assert digest_of(path)[0] not in (before, changed)


@pytest.mark.parametrize("size", [1, 4096, 10_000, 1 << 20])
def test_it_is_the_tree_of_blake2(path, monkeypatch, size):
    """Pieces of any size, the last one short or not; every leaf and the root as the specification numbers them."""
    monkeypatch.setattr(module, "PIECE_BYTES", size * 50)
    monkeypatch.setattr(module, "READ_BYTES", size)
    monkeypatch.setattr(module, "TREE", {**module.TREE, "leaf_size": size * 50})
    data, tree = path.read_bytes(), {"fanout": 0, "depth": 2, "leaf_size": size * 50, "inner_size": 64}
    pieces = [data[start : start + size * 50] for start in range(0, len(data), size * 50)]
    root = hashlib.blake2b(digest_size=16, node_depth=1, last_node=True, **tree)
    for i, piece in enumerate(pieces):
        is_last = i == len(pieces) - 1
        root.update(hashlib.blake2b(piece, digest_size=64, node_offset=i, last_node=is_last, **tree).digest())
    assert digest_of(path)[0] == root.digest()


@pytest.mark.parametrize("damage", [(0, 32, b""), (0, 1, b"z"), (0, 1, b"\xff"), (40, 41, b"x"), (0, 999, b"")])
def test_a_damaged_note_is_ignored(path, notes, damage):
    found = digest_of(path)[0]
    (note,) = notes.iterdir()
    first, end, data = damage
    sound = note.read_bytes()
    note.write_bytes(sound[:first] + data + sound[end:])
    again, reports = digest_of(path)
    assert (again, bool(reports)) == (found, True)
    assert digest_of(path) == (found, [])


def test_a_cache_folder_that_cannot_be_written(path, notes):
    notes.parent.parent.write_text("a file where the folder belongs")
    assert digest_of(path)[0] == digest_of(path)[0]
    assert digest_of(path)[1]


@pytest.mark.parametrize("change", ["written", "replaced", "removed"])
def test_a_model_that_changes_while_it_is_open(path, change):
    with ModelFile(path) as model:
        assert unchanged(model)
        require_unchanged(model)
        if change == "written":
            with open(path, "r+b") as file:
                file.write(b"x")
            os.utime(path, ns=(0, 0))
        elif change == "replaced":
            write_random(path, TINY)
        else:
            path.unlink()
        assert not unchanged(model)
        for check in (require_unchanged, model_digest):
            with pytest.raises(FileError, match="a.m: the model has changed on disk"):
                check(model)


def test_a_model_that_changes_while_it_is_read(path, notes, monkeypatch):
    monkeypatch.setattr(module, "PIECE_BYTES", 10_000)

    def cut(done, total):
        os.truncate(path, 20_000)

    with ModelFile(path) as model, pytest.raises(FileError, match="the model has changed on disk"):
        model_digest(model, cut)
    assert not notes.exists()


@given(plans())
def test_names_of_slices(plan):
    """Every node's is its own, but a share of the same parts has the same, whatever else is said of the node."""
    names = [slice_name(bytes(16), share) for share in plan.shares]
    assert len(set(names)) == len(names)
    for name, share in zip(names, plan.shares, strict=True):
        assert len(bytes.fromhex(name)) == 16
        assert slice_name(bytes(16), replace(share, sum_blocks=range(0), is_root=not share.is_root)) == name
        assert slice_name(b"\1" * 16, share) != name


def test_labels_of_slices():
    share = make_plan(TINY, equal_nodes(3)).shares[1]
    assert slice_label("/models/tiny.m", share) == "tiny.m, heads 2-3, ffn blocks 2-4, vocabulary 171-342"
