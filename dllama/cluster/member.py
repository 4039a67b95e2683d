"""One node of a running cluster, the root or a worker: its slice at work, step by step."""

import time
from typing import NamedTuple

from dllama.cluster import wire
from dllama.cluster.job import Job
from dllama.cluster.mesh import Mesh
from dllama.engine.candidates import Candidates, Reduction, reduce
from dllama.engine.forward import Forward
from dllama.engine.kv_cache import KVCache
from dllama.engine.rows import Rows
from dllama.engine.workspace import MAX_ROWS, Place


class NodeCost(NamedTuple):
    """What a step cost a node: milliseconds at work and in exchanges, bytes of its messages."""

    inference_ms: float
    transfer_ms: float
    sent_bytes: int
    received_bytes: int


class Member:
    """Runs a node's job, with its weights and its links to the other nodes."""

    def __init__(self, job: Job, forward: Forward, mesh: Mesh):
        self.mesh = mesh
        self._forward, self._vocab, self._exchange = forward, job.share.vocab, job.exchange(mesh)
        self._embeddings = Rows(job.buffer_type, forward.config.dim)
        self._sequences: dict[int, KVCache] = {}
        self._moved = 0, 0  # bytes sent and received until the end of a step: parts of the next may come before it

    def step(self, message: wire.Step, payload: memoryview) -> tuple[list[Candidates], NodeCost]:
        """A step's candidates, for each wanted row. ``payload``: embeddings of the rows.

        Raises NodeLost, and ValueError or ModelError for rows that no sound root asks for.
        """
        start = time.perf_counter()
        for sequence in message.freed:
            self._sequences.pop(sequence, None)
        rows = sum(count for _, _, count, _ in message.rows)
        if not 0 < rows <= MAX_ROWS or not all(row < rows for row in message.wanted):
            raise ValueError(f"{rows} rows, of 1 to {MAX_ROWS}, or logits of others")
        adapters = self._forward.adapters
        if not all(adapter < (0 if adapters is None else len(adapters.records)) for *_, adapter in message.rows):
            raise ValueError("an adapter that the plan has not")
        places = [place for run in message.rows for place in self._places(*run)]
        x = self._embeddings.decode(payload, len(places))
        if self._exchange is not None:
            self._exchange.begin(message.step)
        logits = self._forward.step(x, places, message.wanted, self._exchange)
        transfer = 0.0 if self._exchange is None else self._exchange.end()
        reduction = Reduction.from_list(message.reduction)
        candidates = [reduce(row, self._vocab.start, reduction) for row in logits]
        elapsed = time.perf_counter() - start - transfer
        (sent, received), self._moved = self._moved, (self.mesh.sent_bytes, self.mesh.received_bytes)
        moved = self.mesh.sent_bytes - sent, self.mesh.received_bytes - received
        return candidates, NodeCost(elapsed * 1e3, transfer * 1e3, *moved)

    def _places(self, sequence: int, first: int, count: int, adapter: int) -> list[Place]:
        cache = self._sequences.get(sequence)
        if cache is None:
            cache = self._sequences[sequence] = self._forward.sequence(adapter)
        return [Place(cache, position) for position in range(first, first + count)]
