"""``python -m dllama``: the command line without an installed script."""

from dllama.start import dllama

dllama()
