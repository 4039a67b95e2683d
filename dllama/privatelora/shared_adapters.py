"""Adapters that the cloud has ready, each once however many sessions use it."""

from __future__ import annotations

from dllama.engine.adapters import NO_ADAPTER
from dllama.privatelora.adapter import CloudAdapter
from dllama.privatelora.backends import Backend
from dllama.privatelora.session import Unfit


class SharedAdapters:
    """A backend's. One thread uses it at a time: to make an adapter ready takes long, and goes on beside passes."""

    def __init__(self, backend: Backend):
        self._backend = backend
        self._in_use: dict[tuple[str, range], list[int]] = {}  # the backend's number, and how many sessions use it

    def take(self, adapter: CloudAdapter | None, layers: range) -> int:
        """The backend's number of an adapter, for one session more; of None it is NO_ADAPTER. Raises Unfit where there
        are too many, and as the backend does."""
        self._backend.prepare()
        if adapter is None:
            return NO_ADAPTER
        key = adapter.fingerprint, layers
        if key not in self._in_use:
            try:
                self._in_use[key] = [self._backend.add(adapter, layers), 0]
            except LookupError as error:
                raise Unfit(str(error)) from None
        number, _ = self._in_use[key]
        self._in_use[key][1] += 1
        return number

    def give_back(self, number: int) -> None:
        """One session less uses the adapter of this number, and the backend lets go of it after the last."""
        key = next(key for key, (each, _) in self._in_use.items() if each == number)
        self._in_use[key][1] -= 1
        if not self._in_use[key][1]:
            del self._in_use[key]
            self._backend.remove(number)
