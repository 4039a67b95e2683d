import os

import pytest

from bench import convert as bench


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux, to hold a process to a core")
def test_a_small_checkpoint(tmp_path, monkeypatch):
    for name, size in {"DIM": 64, "HIDDEN": 96, "HEADS": 4, "VOCAB": 50}.items():
        monkeypatch.setattr(bench, name, size)
    folder = bench.find_checkpoint(tmp_path, 2)
    assert (folder / "model.safetensors").stat().st_size > 2 * (2 * 50 * 64 + 2 * (4 * 64 * 64 + 3 * 96 * 64))
    assert bench.find_checkpoint(tmp_path, 2) == folder
    for arguments in bench.WAYS.values():
        run = bench.convert(folder, tmp_path / "a.m", arguments, sorted(os.sched_getaffinity(0))[:1])
        assert run.seconds > 0 and run.worked > 0 and 10 << 20 < run.peak_bytes < 1 << 30
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
