"""A model's weights as the compiled stages see them: addresses of matrices, packed or as they are mapped."""

from collections.abc import Callable, Iterable, Sequence
from typing import Protocol

import numpy as np

from dllama.engine.pages import anonymous
from dllama.engine.stages import EXPERT, LAYER
from dllama.formats import ModelConfig, TensorInfo, expert_name
from dllama.kernels import tags
from dllama.kernels.packed import is_packed, pack, packed_bytes
from dllama.kernels.team import Team

ATTENTION = ("q", "k", "v", "o")
FEED_FORWARD = ("w1", "w2", "w3")
NORMS = ("attention_norm", "ffn_norm", "q_norm", "k_norm")
ALIGN = 64


def padded(n: int) -> int:
    """Floats in a row of n values: whole blocks of 32, the last filled up with zeros."""
    return -(-n // 32) * 32


class Source(Protocol):
    """Where weights come from: a whole model file, or a node's slice of one, with the shapes of the slice."""

    config: ModelConfig

    def tensors(self) -> Iterable[TensorInfo]: ...

    def info(self, name: str, layer: int | None = None) -> TensorInfo: ...

    def raw(self, name: str, layer: int | None = None) -> np.ndarray:
        """uint8 [rows, row_bytes], rows at any stride."""

    def f32(self, name: str, layer: int | None = None) -> np.ndarray: ...

    def release(self, name: str, layer: int | None = None) -> None: ...


class Weights:
    """Addresses of the tensors of a model, or of a node's slice of it.

    Quantised matrices that meet Q80 activations are packed for this CPU's kernels, in memory with huge pages where
    the system has them (`bench.bandwidth` tells what that gains), and the file's own pages let go at once. All other
    matrices are used where they are mapped. Norms are copied and padded.

    ``only``: numbers of the layers wanted, None for all;  ``ends``: whether the final norm and the output matrix are.
    ``tag``: the matrices' format; ``layers``: a ``LAYER`` record for each layer; ``experts``: ``EXPERT`` records
    [layers, experts], None for a model without; ``dim_bytes``, ``q_bytes``, ``hidden_bytes``: from one row to the next
    of matrices whose inputs are of that width.
    ``progress(done, total)`` is called with bytes as matrices are packed.
    """

    def __init__(
        self,
        source: Source,
        act: tags.Tag,
        team: Team,
        progress: Callable[[int, int], None],
        only: Sequence[int] | None = None,
        ends: bool = True,
    ):
        config = source.config
        numbers = range(config.n_layers) if only is None else only
        self.tag = tags.BY_NAME[config.weight_type.name.lower()]
        self._source, self._team, self._progress = source, team, progress
        self._kept: list[np.ndarray] = []
        self._packed = self._packing_room(numbers, ends) if is_packed(self.tag, act) else None
        self._done = 0
        self.layers = np.zeros(len(numbers), LAYER)
        present = {info.name for info in source.tensors()}
        self.experts = np.zeros((len(numbers), config.n_experts), EXPERT) if config.arch.has_experts else None
        for index, number in enumerate(numbers):
            layer = self.layers[index]
            for name in ATTENTION:
                layer[name] = self._matrix(name, number)
            self._feed_forward(index, number)
            for name in present.intersection(NORMS):
                layer[name] = self._norm(name, number)
        self.output = self._matrix("output", None) if ends else 0
        self.final_norm = self._norm("final_norm", None) if ends else 0
        self.dim_bytes, self.q_bytes, self.hidden_bytes = (
            self._stride(name) for name in ("q", "o", "w2" if self.experts is None else expert_name("w2", 0))
        )

    def _feed_forward(self, index: int, number: int) -> None:
        layer = self.layers[index]
        if self.experts is None:
            for name in FEED_FORWARD:
                layer[name] = self._matrix(name, number)
            return
        layer["router"] = self._address(self._source.raw("router", number))
        for expert, record in enumerate(self.experts[index]):
            for name in FEED_FORWARD:
                record[name] = self._matrix(expert_name(name, expert), number)

    def _packing_room(self, numbers: Sequence[int], ends: bool) -> np.ndarray:
        """Memory for all matrices."""
        wanted = {*numbers, None} if ends else {*numbers}
        packed = {*ATTENTION, *FEED_FORWARD, "output"}
        self._total = sum(
            self._room(info) for info in self._source.tensors() if info.kind in packed and info.layer in wanted
        )
        return anonymous(self._total, huge=True)

    def _room(self, info: TensorInfo) -> int:
        """Bytes from one packed matrix to the next."""
        return -(-packed_bytes(self.tag, info.rows, info.columns) // ALIGN) * ALIGN

    def _matrix(self, name: str, layer: int | None) -> int:
        raw = self._source.raw(name, layer)
        if self._packed is None:
            return self._address(raw)
        info = self._source.info(name, layer)
        target = self._packed.ctypes.data + self._done
        self._team.run(
            pack, self._team.sync, self.tag, raw.ctypes.data, raw.strides[0], info.rows, info.columns, target
        )
        self._source.release(name, layer)
        self._done += self._room(info)
        self._progress(self._done, self._total)
        return target

    def _stride(self, name: str) -> int:
        """Bytes from one row to the next, the same in every layer; packed rows are as long as their blocks."""
        return self._source.raw(name, 0).strides[0] if self._packed is None else self._source.info(name, 0).row_bytes

    def _norm(self, name: str, layer: int | None) -> int:
        values = self._source.f32(name, layer)
        row = np.zeros(padded(len(values)), np.float32)
        row[: len(values)] = values
        return self._address(row)

    def _address(self, array: np.ndarray) -> int:
        self._kept.append(array)
        return array.ctypes.data
