"""The cloud's layers on torch: CUDA where it is, and torch's CPU, so that the same code is tested everywhere.

``weights`` holds matrices on the device, ``pages`` keys and values, ``adapters`` A and B, ``staging`` what comes and
goes; ``triton_products`` multiplies with packed matrices, ``stack`` computes the products of a layer and what is
between them, ``plan`` prepares a batch of rows for that, ``recorder`` captures CUDA graphs, and ``backend`` ties them
to the interface. Nothing here imports torch before it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from dllama.engine.weights import Source
from dllama.errors import KernelError

if TYPE_CHECKING:
    from dllama.privatelora.backends.torch.backend import TorchBackend

DEVICES = ("cuda", "cpu")


def open_torch(
    source: Source,
    device: str,
    weights: str | None = None,
    nthreads: int | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> TorchBackend:
    """A model's decoder layers on one of DEVICES.

    weights: as in `TorchBackend`;  nthreads: torch's on the CPU, for the whole process; None leaves them as they are

    Raises KernelError where torch or the device is missing, OutOfMemoryError where the layers do not fit.
    """
    try:
        import torch
    except ImportError as error:
        reason = str(error).splitlines()[0]
        raise KernelError(f"torch cannot be used ({reason}): install dllama with its extra gpu") from None
    if device == "cuda" and not torch.cuda.is_available():
        built = "no GPU that it can use" if torch.version.cuda else "been built without CUDA"
        raise KernelError(f"--device cuda: torch {torch.__version__} has {built}; use --device cpu")
    if device == "cpu" and nthreads is not None:
        torch.set_num_threads(nthreads)
    from dllama.privatelora.backends.torch.backend import TorchBackend

    return TorchBackend(source, device, weights, progress)
