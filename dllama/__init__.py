"""Large language models over several weak devices.

from dllama import Llama, SamplerSettings

with Llama("model.m", "tokenizer.t") as llama:
    for piece in llama.generate("Once upon a time", steps=64):
        print(piece.text, end="", flush=True)
"""

import importlib

__version__ = "0.1.0"

_HOMES = {
    "Llama": "dllama.llama",
    "Piece": "dllama.llama",
    "Sampler": "dllama.engine.sampler",
    "SamplerSettings": "dllama.engine.sampler",
    "DllamaError": "dllama.errors",
}

__all__ = ["DllamaError", "Llama", "Piece", "Sampler", "SamplerSettings", "__version__"]


def __getattr__(name: str):
    """The public names, imported when first used: `dllama --help` need not wait for the compiler."""
    if name not in _HOMES:
        raise AttributeError(f"module 'dllama' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
