"""What the cloud keeps of one edge: what it asked for, its sequences, and its step on the way."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np

from dllama.cluster import wire
from dllama.cluster.listener import Peer
from dllama.engine.workspace import Place
from dllama.errors import AdapterError, DllamaError
from dllama.formats import FloatType, ModelConfig
from dllama.privatelora.adapter import CloudAdapter
from dllama.privatelora.backends import Backend
from dllama.privatelora.passage import PRODUCTS, Passage, Stop, most_rows, spans, stops
from dllama.privatelora.shape import AdapterShape
from dllama.privatelora.short_way import EdgeTalk
from dllama.privatelora.travel import Rows, Targets

MOST_SEQUENCES = 256
OVERFLOW = "its values make the model's overflow"


class Unfit(DllamaError):
    """Something an edge asks for, or sends, that the cloud cannot serve: why."""


def adapter_of(wanted: dict, config: ModelConfig, known: dict[str, CloudAdapter]) -> CloudAdapter | None:
    """The adapter that an edge asks for, made from its seed or one of those that the cloud has; ``known``: these, by
    fingerprint. Raises Unfit."""
    if wanted is None:
        return None
    if wanted["fingerprint"] in known:
        return known[wanted["fingerprint"]]
    if wanted["seed"] is None:
        raise Unfit(
            "this cloud has not the A and B of that adapter: start its worker with --adapter cloud.plora, "
            "without --workers"
        )
    try:
        shape = AdapterShape.of(config, wanted["r_c2d"], wanted["r_d2c"], wanted["targets"], wanted["layers"])
        adapter = CloudAdapter(shape, wanted["seed"], name="the edge's adapter")
        adapter.check(config)
    except (ValueError, AdapterError) as error:
        raise Unfit(f"the adapter makes no sense: {error}") from None
    if adapter.fingerprint != wanted["fingerprint"]:
        raise Unfit("the adapter's fingerprint is not that of its seed and ranks with the cloud's model")
    return adapter


class Session:
    """An edge's.

    passages: of the step that is on its way, in the order of its rows; none between steps
    ready_at: when it could go on, None while the edge's answer is awaited;  waits_since: when it began to be
    set_out_at: when its step was taken on first;  left_at: when the last one ended
    seconds: that the present one has cost so far
    hope: how long others wait for it, as a share of what that could save (see `schedule`)
    """

    def __init__(self, wanted: dict, adapter: CloudAdapter | None, number: int, backend: Backend, peer: Peer):
        self.layers, self.context, self.number = range(*wanted["layers"]), wanted["context"], number
        self._backend, self.peer = backend, peer
        self._shape = None if adapter is None else adapter.shape
        self._stops = list(stops(self._shape, self.layers))
        form = FloatType(wanted["form"])
        self._stream = Rows(form, backend.config.dim)
        self._low, self._answers = {}, {}
        for product in {stop.product for stop in self._stops}:
            names = PRODUCTS[product]
            picked = [i for i, target in enumerate(names) if target in self._shape.targets]
            self._low[product] = Targets(form, picked, len(names), self._shape.r_c2d)
            self._answers[product] = Targets(form, picked, len(names), self._shape.r_d2c)
        self._talk = EdgeTalk(self._stops, self._shape, form, peer) if self._stops and backend.has_short_ways else None
        self._sequences: dict[int, object] = {}
        self._step = self._next = 0
        self._wanted: Sequence[int] = ()
        self._most_rows = most_rows(self._shape, backend.config.dim)
        self.passages: list[Passage] = []
        self.ready_at: float | None = None
        self.waits_since = self.left_at = self.set_out_at = 0.0
        self.hope = 1.0
        self.seconds = 0.0

    @property
    def came_from(self) -> Stop | int:
        """The stop that it is at, or the layer that it enters."""
        return self._stops[self._next - 1] if self._next else self.layers.start

    @property
    def goes_to(self) -> Stop | int:
        """The next stop, or the layer that the pass ends in front of."""
        return self._stops[self._next] if self._next < len(self._stops) else self.layers.stop

    @property
    def rows(self) -> int:
        """Of the step that is on its way."""
        return sum(len(passage.places) for passage in self.passages)

    def goes_on(self) -> None:
        """It is about to be taken on."""
        if not self._next:
            self.set_out_at = time.monotonic()

    def enter(self, message: wire.Enter, payload: Sequence) -> None:
        """A step begins. Raises Unfit."""
        if self.passages:
            raise Unfit("a step before the last one has ended")
        count = sum(count for _, _, count in message.rows)
        most, wanted = self._most_rows, message.wanted
        if not 0 < count <= most or not all(row < count for row in wanted) or len(wanted) > count:
            raise Unfit(f"a step of {count} rows, of 1 to {most}, or wanted rows that it has not")
        places = [place for run in message.rows for place in self._places(*run)]
        try:
            x = self._stream.decode(payload[0], count)
        except ValueError as error:
            raise Unfit(f"what enters the layers: {error}") from None
        self.passages = [Passage(places[span], self.number, x[span]) for span in spans(count)]
        self._step, self._next, self._wanted = message.step, 0, message.wanted
        self.ready_at, self.seconds = time.monotonic(), 0.0

    def free(self, numbers: Sequence[int]) -> None:
        """Lets go of sequences; of numbers that there are none for, nothing."""
        for number in numbers:
            self._sequences.pop(number, None)

    def new_sequences(self, message: wire.Enter) -> int:
        """How many caches a step needs that are not there yet."""
        return len({sequence for sequence, _, _ in message.rows} - self._sequences.keys())

    def stopped(self, low: np.ndarray) -> list:
        """The message for the edge at the next stop: A·x, float32 [rows, targets of the product, r_c2d at least].
        Raises Unfit where it is not finite."""
        stop = self._stops[self._next]
        self._next += 1
        self.ready_at, self.waits_since = None, time.monotonic()
        return [wire.unchecked(wire.Low(self._step, *stop)), _encoded(self._low[stop.product], low)]

    def answered(self, message: wire.Answer, payload: Sequence) -> None:
        """The edge's M·A·x is here. Raises Unfit."""
        if not self.passages or self.ready_at is not None:
            raise Unfit("an answer that nobody waits for")
        stop = self._stops[self._next - 1]
        if (message.step, message.layer, message.product) != (self._step, *stop):
            raise Unfit("an answer to something else")
        rows = self.rows
        try:
            answer = self._answers[stop.product].decode(payload[0], rows)
        except ValueError as error:
            raise Unfit(f"the answer of layer {stop.layer}: {error}") from None
        for passage, span in zip(self.passages, spans(rows), strict=True):
            passage.answer = answer[span]
        self.ready_at = time.monotonic()

    @property
    def passed(self) -> int:
        """Stops that A·x has been sent at."""
        return self._next

    @property
    def passes_ahead(self) -> int:
        """That its step still takes."""
        return len(self._stops) + 1 - self._next

    def talk(self) -> EdgeTalk | None:
        """What compiled code has to know to take it past the next stops; None where there are none, or nobody."""
        if self._talk is None or self._next == len(self._stops) or self.peer.lost:
            return None
        self._talk.begin(self._step, self.rows)
        return self._talk

    def went(self, passed: int, answered: bool) -> None:
        """It has been taken past so many stops, and has the answer of the last, or waits for it."""
        self._next, now = passed, time.monotonic()
        self.ready_at, self.waits_since = now if answered else None, now

    def left(self, x: np.ndarray) -> list:
        """The last message of a step: the residual stream of its rows, float32 [rows, dim]. Raises Unfit where it is
        not finite."""
        self.passages, self.ready_at, self.left_at = [], None, time.monotonic()
        head = wire.encode(wire.Leave(self._step, int(self.seconds * 1e6)))
        return head + ([_encoded(self._stream, x[list(self._wanted)])] if self._wanted else [])

    def _places(self, sequence: int, first: int, count: int) -> list[Place]:
        if first + count > self.context:
            raise Unfit(f"position {first + count - 1} is outside the context of {self.context} tokens")
        if sequence not in self._sequences:
            if len(self._sequences) >= MOST_SEQUENCES:
                raise Unfit(f"more than {MOST_SEQUENCES} sequences")
            self._sequences[sequence] = self._backend.sequence(self.context)
        cache = self._sequences[sequence]
        return [Place(cache, position) for position in range(first, first + count)]


def _encoded(rows: Rows | Targets, values: np.ndarray) -> np.ndarray:
    """What the cloud computed as bytes. Raises Unfit."""
    try:
        return rows.encode(values)
    except ValueError:
        raise Unfit(OVERFLOW) from None
