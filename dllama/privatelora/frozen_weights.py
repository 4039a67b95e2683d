"""A and B of the edges' adapters in the cloud's memory, as the compiled halves see them: see `adapters`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from dllama.engine.adapter_weights import NUMBERS
from dllama.engine.memory import available_bytes, in_units
from dllama.engine.pages import anonymous
from dllama.engine.stages import LOW_RANK
from dllama.engine.weights import padded
from dllama.errors import OutOfMemoryError
from dllama.formats import ModelConfig
from dllama.kernels import tags
from dllama.privatelora.adapter import CloudAdapter
from dllama.targets import DENSE, TARGETS

MOST_ADAPTERS = 64


class FrozenWeights:
    """Room for MOST_ADAPTERS adapters, which come and go. ``form``: F32, or F16 to read half as many bytes; ``slices``:
    rows and columns that a node has of each kind of the model's matrices, None where it has them whole.

    records: ``LOW_RANK`` records [adapters, layers, targets], ranks 0 where there is nothing
    """

    def __init__(self, config: ModelConfig, form: tags.Tag, slices: Mapping[str, tuple[range, range]] | None = None):
        self.records = np.zeros((MOST_ADAPTERS, config.n_layers, len(NUMBERS)), LOW_RANK)
        self._parts: dict[str, tuple[slice, slice]] = {}  # what of each target's rows and columns is here
        for name, target in TARGETS.items():
            if config.arch.has_experts and name in DENSE:
                continue
            whole = range(getattr(config, target.outputs)), range(getattr(config, target.inputs))
            rows, columns = whole if slices is None else slices[target.matrix]
            widths = self.records[..., NUMBERS[name]]
            widths["inputs"], widths["outputs"] = len(columns), len(rows)
            self._parts[name] = slice(rows.start, rows.stop), slice(columns.start, columns.stop)
        self._config, self._dtype = config, np.float32 if form is tags.F32 else np.float16
        self._memory: list[np.ndarray | None] = [None] * MOST_ADAPTERS

    def nbytes(self, adapter: CloudAdapter, layers: Sequence[int]) -> int:
        """Bytes that an adapter takes in these layers."""
        shape, widths = adapter.shape, self.records[0, 0]
        each = [
            shape.r_c2d * int(widths[NUMBERS[t]]["inputs"]) + shape.r_d2c * padded(int(widths[NUMBERS[t]]["outputs"]))
            for t in shape.targets
        ]
        return np.dtype(self._dtype).itemsize * sum(each) * len(set(layers).intersection(shape.layers))

    def add(self, adapter: CloudAdapter, layers: Sequence[int]) -> int:
        """The number of an adapter, whose A and B for these layers are in memory now; it has been checked against the
        model. Raises OutOfMemoryError, and LookupError where there is no room for another, or for one of such ranks."""
        rank = max(adapter.shape.r_c2d, adapter.shape.r_d2c)
        if rank > self._config.dim:
            raise LookupError(f"an adapter of rank {rank}, and the model is {self._config.dim} wide")
        number = next((i for i, memory in enumerate(self._memory) if memory is None), None)
        if number is None:
            raise LookupError(f"the cloud has {MOST_ADAPTERS} adapters already, and room for no more")
        needed, free = self.nbytes(adapter, layers), available_bytes()
        if free is not None and needed > free:
            raise OutOfMemoryError(f"the adapter needs {in_units(needed)} of the cloud, {in_units(free)} are free")
        memory = anonymous(needed + 64, huge=True)  # rows are read a little beyond their ends
        size = np.dtype(self._dtype).itemsize
        values, done = memory[: memory.nbytes // size * size].view(self._dtype), 0
        records = self.records[number].copy()
        for layer, target in adapter.shape.places():
            if layer not in layers:
                continue
            record = records[layer, NUMBERS[target]]
            rows, columns = self._parts[target]
            a, b = adapter.a(layer, target)[:, columns], adapter.b_in_model(layer, target, self._config)[rows]
            record["a_rank"], record["b_rank"] = len(a), b.shape[1]
            record["a"] = memory.ctypes.data + size * done
            values[done : done + a.size] = a.ravel()
            done += a.size
            room = values[done : done + b.shape[1] * padded(len(b))].reshape(b.shape[1], -1)
            room[:, : len(b)] = b.T
            record["b"] = memory.ctypes.data + size * done
            done += room.size
        self.records[number], self._memory[number] = records, memory
        return number

    def remove(self, number: int) -> None:
        """Frees an adapter, which no row has any more."""
        self.records["a_rank"][number] = self.records["b_rank"][number] = 0
        self._memory[number] = None
