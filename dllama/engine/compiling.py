"""The first run on a machine compiles: said beforehand, noted afterwards, and done by one process for all."""

import fcntl
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from dllama.errors import FileError
from dllama.formats import FloatType, ModelConfig
from dllama.formats.files import reason
from dllama.kernels import jit


def forms_of(config: ModelConfig, buffer_type: FloatType, kv_type: FloatType, *more: str) -> list[str]:
    """What kernels are compiled for, as `jit.is_compiled` has it; ``more``: "adapters", "halves" or "exchange", where
    they have to do with these."""
    forms = [kind.name.lower() for kind in (config.weight_type, buffer_type, kv_type)]
    return forms + ["experts"] * config.arch.has_experts + list(more)


@contextmanager
def compiling(
    config: ModelConfig, buffer_type: FloatType, kv_type: FloatType, notify: Callable[[str], None], *more: str
) -> Iterator[None]:
    """The block makes a `Forward` for such a model, or what runs it in halves; ``more`` as in `forms_of`. Raises
    FileError where its kernels cannot be stored.

    Several processes that need the same kernels wait for the first of them to compile: a machine's local workers would
    else compile side by side, and take as many times as long.
    """
    forms = forms_of(config, buffer_type, kv_type, *more)
    if jit.is_compiled(*forms):
        yield
        return
    often = "once" if jit.KEEPS else f"at every start, for {jit.CACHE} cannot be written (set NUMBA_CACHE_DIR)"
    notify(f"compiling the {jit.ISA.name} kernels for this machine: {often}, up to half a minute")
    try:
        with _alone():
            yield
    except OSError as error:
        raise FileError(jit.CACHE, f"the compiled kernels cannot be stored: {reason(error)}") from None
    jit.mark_compiled(*forms)


@contextmanager
def _alone() -> Iterator[None]:
    """One process at a time."""
    if not jit.KEEPS:
        yield
        return
    with open(jit.CACHE / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
