"""The backend that a device's name asks for."""

from __future__ import annotations

from collections.abc import Callable

from dllama.engine import memory
from dllama.engine.compiling import compiling
from dllama.formats import FloatType, ModelFile
from dllama.kernels import tags
from dllama.kernels.team import Team
from dllama.privatelora.backends import Backend
from dllama.privatelora.backends.cpu import CpuBackend


def open_backend(
    device: str, nthreads: int, buffer_type: FloatType, kv_type: FloatType, notify: Callable[[str], None]
) -> Callable[[ModelFile, Callable[[int, int], None]], Backend]:
    """Makes the backend for a model, as `Cloud` wants it. device: "cpu", "cuda", or "auto" for CUDA where it is;
    buffer_type, kv_type: as in `Llama`, for the CPU."""

    def cpu(model: ModelFile, progress: Callable[[int, int], None]) -> Backend:
        memory.require(model.config, 1, kv_type, model.path)
        act, cache = (tags.BY_NAME[kind.name.lower()] for kind in (buffer_type, kv_type))
        with compiling(model.config, buffer_type, kv_type, notify, halves=True):
            return CpuBackend(model, Team(nthreads), act, cache, progress)

    return cpu
