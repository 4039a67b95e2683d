"""One node of a running cluster, the root or a worker: its slice at work, step by step."""

import time
from typing import NamedTuple

import numpy as np

from dllama.cluster import wire
from dllama.cluster.job import Job
from dllama.cluster.mesh import Mesh
from dllama.cluster.traffic import vector_bytes
from dllama.engine.candidates import Candidates, Reduction, reduce
from dllama.engine.forward import Forward
from dllama.engine.kv_cache import KVCache
from dllama.engine.weights import padded
from dllama.engine.workspace import MAX_ROWS, Place
from dllama.formats import FloatType
from dllama.kernels import tags
from dllama.kernels.travel import decode_sum, encode


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
        self._embeddings = Embeddings(forward.config.dim, job.buffer_type)
        self._sequences: dict[int, KVCache] = {}
        self._transfer = 0.0

    def step(self, message: wire.Step, payload: memoryview) -> tuple[list[Candidates], NodeCost]:
        """A step's candidates, for each wanted row. ``payload``: embeddings of the rows.

        Raises NodeLost, and ValueError or ModelError for rows that no sound root asks for.
        """
        start, sent, received = time.perf_counter(), self.mesh.sent_bytes, self.mesh.received_bytes
        self._transfer = 0.0
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
        logits = self._forward.step(x, places, message.wanted, self._timed if self._exchange is not None else None)
        reduction = Reduction.from_list(message.reduction)
        candidates = [reduce(row, self._vocab.start, reduction) for row in logits]
        elapsed = time.perf_counter() - start - self._transfer
        moved = self.mesh.sent_bytes - sent, self.mesh.received_bytes - received
        return candidates, NodeCost(elapsed * 1e3, self._transfer * 1e3, *moved)

    def _places(self, sequence: int, first: int, count: int, adapter: int) -> list[Place]:
        cache = self._sequences.get(sequence)
        if cache is None:
            cache = self._sequences[sequence] = self._forward.sequence(adapter)
        return [Place(cache, position) for position in range(first, first + count)]

    def _timed(self, x: int, stride: int, rows: int) -> None:
        start = time.perf_counter()
        try:
            self._exchange(x, stride, rows)
        finally:
            self._transfer += time.perf_counter() - start


class Embeddings:
    """Rows of the embedding as they travel, in the buffers' type."""

    def __init__(self, dim: int, buffer_type: FloatType):
        self._dim, self._tag = dim, tags.BY_NAME[buffer_type.name.lower()]
        self.row_bytes = vector_bytes(dim, buffer_type)

    def encode(self, x: np.ndarray) -> np.ndarray:
        """float32 [rows, dim] as bytes, uint8."""
        rows = np.zeros((len(x), padded(self._dim)), np.float32)
        rows[:, : self._dim] = x
        out = np.empty(len(x) * self.row_bytes, np.uint8)
        encode(self._tag, rows.ctypes.data, rows.strides[0], len(x), self._dim, out.ctypes.data)
        return out

    def decode(self, payload: memoryview, rows: int) -> np.ndarray:
        """The bytes of so many rows as float32 [rows, dim]. Raises ValueError where they are not as many."""
        if len(payload) != rows * self.row_bytes:
            raise ValueError(f"{len(payload)} bytes for {rows} embeddings of {self.row_bytes} bytes")
        data = np.frombuffer(payload, np.uint8)
        x = np.zeros((rows, padded(self._dim)), np.float32)
        decode_sum(self._tag, np.array([data.ctypes.data]), x.ctypes.data, x.strides[0], rows, self._dim)
        return x[:, : self._dim]
