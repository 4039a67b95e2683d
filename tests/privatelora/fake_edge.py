"""An edge made by hand, that says whatever it likes."""

import numpy as np

from dllama import __version__
from dllama.cluster import wire
from dllama.cluster.digest import model_digest
from dllama.formats import FloatType, ModelFile
from dllama.privatelora.adapter import EdgeAdapter
from dllama.privatelora.passage import stops, targets_of
from tests.cluster.stranger import Stranger

HELLO = wire.Hello(wire.PROTOCOL, __version__, bytes(range(16)), "edge")


class FakeEdge(Stranger):
    """Of a model and an adapter, or none, with F32 travelling; all that it does it is told to."""

    def __init__(self, address: str, model: ModelFile, adapter: EdgeAdapter | None = None):
        super().__init__(address)
        self.config, self.shape = model.config, None if adapter is None else adapter.shape
        layers = range(self.config.n_layers)
        self.stops = list(stops(self.shape, layers))
        self.session = {
            "model_digest": model_digest(model),
            "layers": (0, self.config.n_layers),
            "context": self.config.seq_len,
            "form": int(FloatType.F32),
            "adapter": None,
        }
        if adapter is not None:
            self.session["adapter"] = {
                "r_c2d": self.shape.r_c2d,
                "r_d2c": self.shape.r_d2c,
                "targets": self.shape.targets,
                "layers": self.shape.layers,
                "fingerprint": adapter.fingerprint,
                "seed": adapter.seed,
            }

    def refused(self) -> str:
        """Why it was refused."""
        message = self.hear(wire.Refuse, wire.Low, wire.Leave, wire.Opened)
        assert type(message) is wire.Refuse, message
        return message.reason

    def greet(self) -> None:
        self.say(HELLO)
        assert type(self.hear(wire.Welcome, wire.Refuse)) is wire.Welcome

    def open(self, **changes) -> None:
        """Ready for steps."""
        self.greet()
        self.say(wire.Open(self.session | changes))
        answer = self.hear(wire.Opened, wire.Refuse)
        assert type(answer) is wire.Opened, answer

    def enter(self, step: int = 1, rows=((0, 0, 1),), wanted=(0,), freed=(), payload=None) -> None:
        """``payload``: by default as many rows of zeros as it takes."""
        payload = bytes(4 * self.config.dim * sum(run[2] for run in rows)) if payload is None else payload
        self.say(wire.Enter(step, rows, wanted, freed), payload)

    def answer(self, low: wire.Low, payload=None, rows: int = 1) -> None:
        """``payload``: by default zeros."""
        self.say(wire.Answer(*low), bytes(self.answer_bytes(low.product, rows)) if payload is None else payload)

    def answer_bytes(self, product: int, rows: int = 1) -> int:
        return 4 * rows * len(targets_of(self.shape, product)) * self.shape.r_d2c

    def step(self, number: int = 1, **entering):
        """A whole one, with zeros for answers: what came at its end."""
        self.enter(number, **entering)
        while True:
            message = self.hear(wire.Low, wire.Leave, wire.Refuse)
            if type(message) is not wire.Low:
                return message
            self.answer(message, rows=sum(run[2] for run in entering.get("rows", ((0, 0, 1),))))


def floats(count: int, value: float) -> bytes:
    """So many, of which one in the middle is special."""
    values = np.zeros(count, np.float32)
    values[count // 2] = value
    return values.tobytes()
