"""Where the program keeps files of its own."""

import sys
from pathlib import Path

import pytest

from dllama.folders import cache_folder, config_folder


@pytest.mark.skipif(sys.platform == "darwin", reason="has folders of its own")
def test_the_user_s_folders(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.setenv("XDG_CACHE_HOME", "/fast")
    monkeypatch.setenv("XDG_CONFIG_HOME", "")  # empty is as good as unset
    assert (cache_folder(), config_folder()) == (Path("/fast/dllama"), Path("/home/ada/.config/dllama"))
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("XDG_CONFIG_HOME", "/settings")
    assert (cache_folder(), config_folder()) == (Path("/home/ada/.cache/dllama"), Path("/settings/dllama"))
