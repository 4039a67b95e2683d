"""Checkpoints of other programs -> `.m` and `.t` files: ``dllama-convert``, or ``python -m converter``."""
