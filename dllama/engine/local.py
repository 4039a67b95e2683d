"""The engine of one machine."""

import time
from collections.abc import Callable, Sequence
from functools import partial

from dllama.engine import memory
from dllama.engine.adapter_weights import AdapterWeights, ranks_of, values_of
from dllama.engine.adapters import NO_ADAPTER
from dllama.engine.candidates import Candidates, Reduction, reduce
from dllama.engine.compiling import compiling
from dllama.engine.forward import Forward
from dllama.engine.interface import NodeCost, Row
from dllama.engine.kv_cache import KVCache
from dllama.engine.workspace import MAX_ROWS
from dllama.formats import FloatType, ModelFile
from dllama.kernels import tags
from dllama.kernels.team import Team
from dllama.lora import LoraAdapter


class LocalEngine:
    """A model on this machine alone: see `Engine`.

    Raises OutOfMemoryError before loading what cannot fit. ``adapters`` have been checked against the model; ``notify``
    and ``progress`` as in `Llama`.
    """

    def __init__(
        self,
        model: ModelFile,
        team: Team,
        context: int,
        buffer_type: FloatType,
        kv_type: FloatType,
        adapters: Sequence[LoraAdapter],
        notify: Callable[[str], None],
        progress: Callable[[str, int, int], None],
    ):
        memory.require(model.config, context, kv_type, model.path, sum(adapter.nbytes for adapter in adapters))
        self.config, self.context, self.most_rows = model.config, context, MAX_ROWS
        act, cache = (tags.BY_NAME[kind.name.lower()] for kind in (buffer_type, kv_type))
        weights = None
        if adapters:
            weights = AdapterWeights(ranks_of(adapters, model.config), model)
            weights.fill(values_of(adapters, model.config))
        with compiling(model.config, buffer_type, kv_type, notify, *["adapters"] * bool(adapters)):
            loaded = partial(progress, "loading weights")
            self._forward = Forward(model, team, act, cache, context, loaded, adapters=weights)
        self.cost = ()

    def sequence(self, adapter: int = NO_ADAPTER) -> KVCache:
        return self._forward.sequence(adapter)

    def step(self, rows: Sequence[Row], wanted: Sequence[int], reduction: Reduction) -> list[Candidates]:
        start = time.perf_counter()
        logits = self._forward.forward(rows, wanted)
        self.cost = (NodeCost("root", (time.perf_counter() - start) * 1e3),)
        return [reduce(row, 0, reduction) for row in logits]

    def close(self) -> None:
        """Nothing to let go of that is not freed with it."""
