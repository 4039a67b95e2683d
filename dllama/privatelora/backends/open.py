"""The backend that a device's name asks for."""

from __future__ import annotations

from collections.abc import Callable

from dllama.engine import memory
from dllama.engine.compiling import compiling
from dllama.errors import KernelError
from dllama.formats import FloatType, ModelFile
from dllama.kernels import tags
from dllama.kernels.team import Team
from dllama.privatelora.backends import Backend
from dllama.privatelora.backends.cpu import CpuBackend

Maker = Callable[[ModelFile, Callable[[int, int], None]], Backend]
"""Makes the backend for a model, as `Cloud` wants it; the second argument is told the bytes done and in all."""


def open_backend(
    device: str,
    nthreads: int,
    buffer_type: FloatType,
    kv_type: FloatType,
    notify: Callable[[str], None],
    weights: str | None = None,
) -> Maker:
    """device: "cpu", "cuda", or "auto" for CUDA where it is;  nthreads, buffer_type, kv_type: for the CPU
    weights: for CUDA, what matrices are unpacked to ("f16", "bf16" or "f32"), None to keep them as the file has them

    The maker raises KernelError where the device is missing, OutOfMemoryError where the layers do not fit.
    """

    def cuda(model: ModelFile, progress: Callable[[int, int], None]) -> Backend:
        from dllama.privatelora.backends.torch import open_torch

        return open_torch(model, "cuda", weights, progress=progress)

    def cpu(model: ModelFile, progress: Callable[[int, int], None]) -> Backend:
        memory.require(model.config, 1, kv_type, model.path)
        act, cache = (tags.BY_NAME[kind.name.lower()] for kind in (buffer_type, kv_type))
        with compiling(model.config, buffer_type, kv_type, notify, "halves"):
            return CpuBackend(model, Team(nthreads), act, cache, progress)

    def auto(model: ModelFile, progress: Callable[[int, int], None]) -> Backend:
        try:
            return cuda(model, progress)
        except KernelError:  # no torch, or no GPU
            if weights is not None:
                notify("--unpack has no effect: there is no GPU to be used, and the CPU takes the matrices as they are")
            return cpu(model, progress)

    return {"cpu": cpu, "cuda": cuda, "auto": auto}[device]
