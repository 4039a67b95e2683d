"""What a PrivateLoRA adapter adapts: which matrices of which layers, how wide they are, and the ranks between."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from dllama.formats import ModelConfig
from dllama.formats.config import MAX_DIM, MAX_LAYERS
from dllama.targets import DENSE, TARGETS, parse_targets

MAX_RANK = 1 << 13
WIDTHS = {"dim": "width", "q_dim": "width of the queries", "kv_dim": "width of the keys", "hidden_dim": "hidden width"}
"""Attributes of ModelConfig that are the width of some target, and their names in messages."""

Place = tuple[int, str]  # a layer and a target


@dataclass(frozen=True)
class AdapterShape:
    """Which places have matrices, and of which shapes. Raises ValueError, with the reason, for what cannot be.

    n_layers: of the model, adapted or not
    widths: "dim", "q_dim", "kv_dim" and "hidden_dim" of the model, those that its targets have for inputs or outputs
    r_c2d: values that go from the cloud to the device for a place and a token;  r_d2c: those that come back
    targets: names in TARGETS, in its order;  layers: those with an adapter, ascending; every target is in each of them
    """

    n_layers: int
    widths: Mapping[str, int]
    r_c2d: int
    r_d2c: int
    targets: tuple[str, ...]
    layers: tuple[int, ...]

    def __post_init__(self):
        _check_range("n_layers", self.n_layers, MAX_LAYERS)
        _check_range("r_c2d", self.r_c2d, MAX_RANK)
        _check_range("r_d2c", self.r_d2c, MAX_RANK)
        if not self.targets or not self.layers:
            raise ValueError("no target, or no layer")
        if parse_targets(",".join(self.targets)) != self.targets:
            raise ValueError(f"its targets are {', '.join(self.targets)}, not in the order {', '.join(TARGETS)}")
        if list(self.layers) != sorted(set(self.layers)):
            raise ValueError("its layers do not ascend")
        if self.layers[0] < 0 or self.layers[-1] >= self.n_layers:
            raise ValueError(f"its layers are not those of a model of {self.n_layers}")
        if set(self.widths) != _widths_of(self.targets):
            raise ValueError(f"widths of {', '.join(sorted(self.widths))}, which are not those of its targets")
        for name, width in self.widths.items():
            _check_range(name, width, MAX_DIM)

    @classmethod
    def of(
        cls, config: ModelConfig, r_c2d: int, r_d2c: int, targets: tuple[str, ...], layers: Sequence[int] | None = None
    ) -> AdapterShape:
        """An adapter for a model; ``layers``: those to adapt, None for all of them."""
        widths = {name: getattr(config, name) for name in WIDTHS if name in _widths_of(targets)}
        layers = tuple(range(config.n_layers)) if layers is None else tuple(layers)
        return cls(config.n_layers, widths, r_c2d, r_d2c, targets, layers)

    def places(self) -> Iterator[Place]:
        """Every layer and target with an adapter, in the order of the files."""
        return ((layer, target) for layer in self.layers for target in self.targets)

    def a(self, target: str) -> tuple[int, int]:
        """Shape of A: the ranks' values of x, ``A·x``."""
        return self.r_c2d, self.widths[TARGETS[target].inputs]

    def b(self, target: str) -> tuple[int, int]:
        """Shape of B."""
        return self.widths[TARGETS[target].outputs], self.r_d2c

    @property
    def m(self) -> tuple[int, int]:
        """Shape of M, the same everywhere."""
        return self.r_d2c, self.r_c2d

    @property
    def n_trained(self) -> int:
        """Values of all M together."""
        return self.r_c2d * self.r_d2c * len(self.targets) * len(self.layers)

    def mismatch(self, config: ModelConfig) -> str | None:
        """In what a model is not the one that the adapter is for, in words; None where it may be."""
        if config.n_layers != self.n_layers:
            return f"for a model of {self.n_layers} layers, and this one has {config.n_layers}"
        if config.arch.has_experts and set(self.targets) & set(DENSE):
            return f"it adapts {' '.join(DENSE)} or some of them, and this model is a mixture of experts"
        for name, width in self.widths.items():
            if getattr(config, name) != width:
                return f"for a model whose {WIDTHS[name]} is {width}, and it is {getattr(config, name)} here"
        return None

    def to_metadata(self) -> dict[str, str]:
        """As the text that the files hold."""
        numbers = {"n_layers": self.n_layers, **self.widths, "r_c2d": self.r_c2d, "r_d2c": self.r_d2c}
        return {
            **{name: str(number) for name, number in numbers.items()},
            "targets": " ".join(self.targets),
            "layers": " ".join(map(str, self.layers)),
        }

    @classmethod
    def from_metadata(cls, metadata: Mapping[str, str]) -> AdapterShape:
        """The way back; ValueError with the reason where the text is not an adapter's."""
        return cls(
            whole(metadata, "n_layers"),
            {name: whole(metadata, name) for name in WIDTHS if name in metadata},
            whole(metadata, "r_c2d"),
            whole(metadata, "r_d2c"),
            tuple(_text(metadata, "targets").split()),
            tuple(_whole(word, "layers") for word in _text(metadata, "layers").split()),
        )


def whole(metadata: Mapping[str, str], name: str) -> int:
    """The whole number under a name; ValueError where there is none."""
    return _whole(_text(metadata, name), name)


def _text(metadata: Mapping[str, str], name: str) -> str:
    if name not in metadata:
        raise ValueError(f"{name} is missing")
    return metadata[name]


def _whole(text: str, name: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) <= 20):
        raise ValueError(f"{name} is {text[:30]!r}, not a whole number")
    return int(text)


def _widths_of(targets: Sequence[str]) -> set[str]:
    return {name for target in targets for name in (TARGETS[target].inputs, TARGETS[target].outputs)}


def _check_range(name: str, value: int, largest: int) -> None:
    if not 1 <= value <= largest:
        raise ValueError(f"{name} is {value}, not between 1 and {largest}")
