"""``python -m dllama``: the command line without an installed script."""

from dllama.cli import main

main()
