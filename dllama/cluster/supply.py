"""The root gives every worker its job and its slice, all of them at the same time, until all are ready."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from dllama.cluster import wire
from dllama.cluster.digest import DIGEST_BYTES
from dllama.cluster.hub import Hub
from dllama.cluster.job import Job
from dllama.cluster.links import Link, LinkLost
from dllama.cluster.mesh import NodeLost, blamed
from dllama.cluster.transfer import Chunk, Sending, adapter_chunks
from dllama.engine.adapter_weights import values_of
from dllama.formats import ModelFile
from dllama.lora import LoraAdapter

WINDOW = 8
"""Chunks on their way to one worker."""
SILENCE_SECONDS = 20.0
"""A worker that says nothing for so long while it gets ready is given up; it tells of its progress twice a second."""


class Supply:
    """Gets workers ready for their jobs, which ``adapters`` are part of. ``links`` and ``jobs`` by the numbers of the
    nodes.

    ``progress(task, done, total)``: bytes that all of them have got.
    """

    def __init__(
        self,
        model: ModelFile,
        hub: Hub,
        links: Mapping[int, Link],
        jobs: Mapping[int, Job],
        adapters: Sequence[LoraAdapter],
        progress: Callable[[str, int, int], None],
    ):
        self._model, self._hub, self._links, self._jobs, self._progress = model, hub, links, jobs, progress
        self._adapters = adapters
        self._numbers = {link: node for node, link in links.items()}
        self._sending: dict[int, Sending] = {}
        self._chunks: dict[int, Iterator[Chunk]] = {}
        self._open: set[int] = set()  # workers that have chunks to come
        self._flying = dict.fromkeys(links, 0)
        self._waiting = set(links)
        self._heard = dict.fromkeys(links, time.monotonic())

    def run(self) -> None:
        """Returns when all workers are ready. Raises NodeLost for one that is lost or refuses, FileError for a model
        that has changed on disk."""
        for node, job in self._jobs.items():
            self._send(node, job.message())
        turns = 0
        while self._waiting:
            sent = [self._feed(node) for node in sorted(self._open)]
            turns = turns + 1 if self._receive(0 if any(sent) else 200) else 0
            if turns % len(self._links) == 0:
                self._check()

    def _check(self) -> None:
        """When there is nothing to read, or every link that has something had its turn: has any worker been silent for
        too long?"""
        for node in self._waiting:
            if time.monotonic() - self._heard[node] > SILENCE_SECONDS:
                raise NodeLost(node, f"it has not been heard of for {SILENCE_SECONDS:g} s")

    def _feed(self, node: int) -> bool:
        """Sends the next chunk, if the worker has room for it and there is one."""
        if self._flying[node] >= WINDOW:
            return False
        chunk = next(self._chunks[node], None)
        if chunk is None:
            self._open.discard(node)
            return False
        self._flying[node] += 1
        self._send(node, wire.Chunk(self._jobs[node].epoch, chunk.index, chunk.digest), chunk.data.data)
        return True

    def _receive(self, timeout_ms: int) -> bool:
        """Whether there was anything to read."""
        try:
            received = self._hub.receive(timeout_ms)
        except LinkLost as lost:
            if lost.source in self._numbers:
                raise NodeLost(self._numbers[lost.source], lost.reason) from None
            return True
        if received is None:
            return False
        node = self._numbers.get(received[0])
        if node is None:
            return True
        try:
            message, payload = wire.decode(received[1])
        except wire.WireError as error:
            raise NodeLost(node, str(error)) from None
        self._heard[node] = time.monotonic()
        self._take(node, message, payload)
        return True

    def _take(self, node: int, message, payload) -> None:
        if type(message) is wire.Refuse:
            raise NodeLost(node, message.reason)
        if type(message) is wire.Bye:
            raise NodeLost(node, "it has left")
        if getattr(message, "epoch", None) != self._jobs[node].epoch:
            return
        if type(message) is wire.Lost:
            raise blamed(message, node, self._jobs[node].addresses)
        if type(message) is wire.Need and not message.has_all:
            digests = payload[0] if payload else b""
            held = [bytes(digests[i : i + DIGEST_BYTES]) for i in range(0, len(digests), DIGEST_BYTES)]
            self._sending[node] = Sending(self._model, self._jobs[node].layout, held)
            self._chunks[node] = iter(self._sending[node].next, None)
            self._open.add(node)
        elif type(message) is wire.NeedAdapters:
            share = self._jobs[node].share
            self._chunks[node] = adapter_chunks(values_of(self._adapters, share.config, share.slices))
            self._open.add(node)
        elif type(message) is wire.Got:
            self._flying[node] -= 1
            self._tell()
        elif type(message) is wire.Ready:
            self._waiting.discard(node)

    def _tell(self) -> None:
        done = sum(sending.done_bytes for sending in self._sending.values())
        total = sum(sending.total_bytes for sending in self._sending.values())
        self._progress("sending weights", done, total)

    def _send(self, node: int, message, *payload) -> None:
        try:
            self._links[node].send(wire.encode(message, *payload))
        except LinkLost as lost:
            raise NodeLost(node, lost.reason) from None
