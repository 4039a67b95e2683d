"""Where the program keeps files of its own in the user's home."""

import os
import sys
from pathlib import Path


def cache_folder() -> Path:
    """What can be made again at any time: ``$XDG_CACHE_HOME/dllama``, else as the system has it. May not exist yet."""
    if sys.platform == "darwin":
        return Path(os.path.expanduser("~/Library/Caches")) / "dllama"
    return Path(os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")) / "dllama"


def config_folder() -> Path:
    """What the user would miss: ``$XDG_CONFIG_HOME/dllama``, else as the system has it. May not exist yet."""
    if sys.platform == "darwin":
        return Path(os.path.expanduser("~/Library/Application Support")) / "dllama"
    return Path(os.environ.get("XDG_CONFIG_HOME") or os.path.expanduser("~/.config")) / "dllama"
