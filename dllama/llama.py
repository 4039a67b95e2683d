"""The public API: a model and its tokenizer, ready to generate."""

import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dllama import embedded
from dllama.cluster.plan import Plan
from dllama.cluster.settings import ClusterSettings
from dllama.engine.candidates import Candidates, Reduction
from dllama.engine.interface import NodeCost, Row
from dllama.engine.local import LocalEngine
from dllama.engine.sampler import Sampler, SamplerSettings
from dllama.errors import AdapterError, ModelError, PromptError
from dllama.formats import FloatType, ModelFile
from dllama.kernels import jit
from dllama.kernels.team import Team, usable_cpus
from dllama.lora import LoraAdapter, read_lora
from dllama.privatelora.settings import EdgeSettings
from dllama.tokenizer import load_tokenizer

LOGIT_ROWS = 32
"""Rows whose logits ``Llama.logits`` asks for at a time."""


@dataclass(frozen=True)
class Piece:
    """One generated token and what it cost. The first one's inference is the prompt's, ``Llama.prefill_ms``.

    text: what it adds to the text, "" while a character is incomplete; generation_ms: all of it, the sampling too;
    nodes: what the forward pass cost each node, this one first, and nothing for the first token.
    """

    text: str
    token_id: int
    generation_ms: float
    nodes: tuple[NodeCost, ...] = ()

    @property
    def inference_ms(self) -> float:
        """Time that this node was at work on the forward pass."""
        return self.nodes[0].inference_ms if self.nodes else 0.0

    @property
    def transfer_ms(self) -> float:
        """Time that this node waited for others in it."""
        return self.nodes[0].transfer_ms if self.nodes else 0.0

    @property
    def sent_bytes(self) -> int:
        return self.nodes[0].sent_bytes if self.nodes else 0

    @property
    def received_bytes(self) -> int:
        return self.nodes[0].received_bytes if self.nodes else 0


class Llama:
    """A model, loaded on this machine or over a cluster of which it is the root.

    Without paths it is the small model that comes with the package.

    nthreads: None takes every CPU this process may use; context: positions to make room for, None the model's own;
    weights_float_type: if given, the model file must hold this type; buffer_float_type: "q80" or "f32", what enters
    the products; kv_float_type: "f16", "f32" or "q80", how keys and values are kept; cluster: the workers that hold
    the rest of the model, None for this machine alone; private: the cloud that works the model's middle layers, with
    this machine as PrivateLoRA's edge; adapters: LoRA adapters that texts may be generated with, the
    folders that PEFT writes, by names of your choice; notify: called with a line when something takes long or goes
    wrong and is mended; progress: called with a task's name, the bytes done and in all, while weights are made ready.

    Raises FileError or FormatError for files that cannot be used, ModelError for a model and options that do not fit
    each other, AdapterError for an adapter that is not supported or is another model's, OutOfMemoryError before loading
    what cannot fit, KernelError for kernels this CPU cannot run, and ClusterError or PlanError for workers that cannot
    be used.
    """

    def __init__(
        self,
        model: str | os.PathLike | None = None,
        tokenizer: str | os.PathLike | None = None,
        *,
        nthreads: int | None = None,
        context: int | None = None,
        weights_float_type: str | None = None,
        buffer_float_type: str = "q80",
        kv_float_type: str = "f16",
        cluster: ClusterSettings | None = None,
        private: EdgeSettings | None = None,
        adapters: Mapping[str, str | os.PathLike] | None = None,
        notify: Callable[[str], None] = lambda line: None,
        progress: Callable[[str, int, int], None] = lambda task, done, total: None,
    ):
        start = time.perf_counter()
        if (model is None) != (tokenizer is None):
            raise ModelError("a model and its tokenizer come together: give both, or neither for the embedded model")
        self._model = ModelFile(embedded.model_path() if model is None else model)
        self.config = self._model.config
        self._check_types(weights_float_type, buffer_float_type, kv_float_type)
        self.tokenizer = load_tokenizer(embedded.tokenizer_path() if tokenizer is None else tokenizer)
        if self.tokenizer.vocab_size != self.config.vocab_size:
            raise ModelError(
                f"{tokenizer}: the tokenizer has {self.tokenizer.vocab_size} tokens and {model} has "
                f"{self.config.vocab_size}: they do not belong together"
            )
        self.context = self.config.seq_len if context is None else context
        if not 0 < self.context <= self.config.seq_len:
            raise ModelError(
                f"{self._model.path}: a context of {self.context} tokens was asked for, and the model has "
                f"{self.config.seq_len}"
            )
        self.nthreads = usable_cpus() if nthreads is None else nthreads
        if self.nthreads < 1:
            raise ValueError(f"nthreads is {nthreads}: it must be 1 or more")
        self.kernels = jit.ISA.name
        types = FloatType.parse(buffer_float_type), FloatType.parse(kv_float_type)
        loras = self._read(adapters or {})
        self._team = Team(self.nthreads)
        args = self._model, self._team, self.context, *types
        if private is not None:
            from dllama.privatelora.edge import EdgeEngine

            self._engine = EdgeEngine(*args, private, notify, progress)
        elif cluster is None:
            self._engine = LocalEngine(*args, loras, notify, progress)
        else:
            from dllama.cluster.root import ClusterEngine

            self._engine = ClusterEngine(*args, cluster, loras, notify, progress)
        self.prefill_ms = 0.0
        self.stop_reason: str | None = None
        self.load_ms = (time.perf_counter() - start) * 1e3

    @property
    def plan(self) -> Plan | None:
        """Who holds what in the cluster, another one after a worker was lost; None without one."""
        return getattr(self._engine, "plan", None)

    def generate(
        self,
        prompt: str | Sequence[int],
        steps: int = 64,
        sampler: SamplerSettings | None = None,
        adapter: str | None = None,
    ) -> Iterator[Piece]:
        """Pieces of the text that continues the prompt (text, or token ids), as they come.

        adapter: the name of one of the adapters; without it the model writes as it is.

        Ends at an end-of-text token, which is not yielded, after ``steps`` tokens or at the end of the context;
        ``stop_reason`` then says "eos", "steps" or "context". ``prefill_ms`` is the prompt's time. Raises PromptError
        for a prompt that is empty or longer than the context, AdapterError for a name that no adapter has.
        """
        tokens = self.encode(prompt)
        choose = Sampler(sampler or SamplerSettings(), self.config.vocab_size)
        decoder = self.tokenizer.stream()
        sequence = self._sequence(adapter)
        self.stop_reason = None
        start = time.perf_counter()
        candidates = self._prefill(sequence, tokens, choose.reduction(tokens))
        self.prefill_ms = (time.perf_counter() - start) * 1e3
        nodes = ()
        for produced in range(steps):
            start = time.perf_counter()
            if produced:
                if len(tokens) > self.context:
                    self.stop_reason = "context"
                    return
                row = Row(sequence, len(tokens) - 1, tokens[-1])
                candidates = self._engine.step([row], [0], choose.reduction(tokens))[0]
                nodes = self._engine.cost
            token = choose.choose(candidates)
            if token in self.tokenizer.eos_ids:
                self.stop_reason = "eos"
                return
            tokens.append(token)
            text = decoder.push(token)
            yield Piece(text, token, (time.perf_counter() - start) * 1e3, nodes)
        self.stop_reason = "steps"

    def logits(self, prompt: str | Sequence[int], adapter: str | None = None) -> np.ndarray:
        """Logits after each token of a text (or of token ids), float32 [tokens, vocab_size]; ``adapter`` as in
        ``generate``."""
        tokens = self.encode(prompt)
        sequence = self._sequence(adapter)
        out = np.empty((len(tokens), self.config.vocab_size), np.float32)
        for first in range(0, len(tokens), LOGIT_ROWS):
            rows = [Row(sequence, first + i, token) for i, token in enumerate(tokens[first : first + LOGIT_ROWS])]
            found = self._engine.step(rows, range(len(rows)), Reduction.ALL)
            out[first : first + len(rows)] = [candidates.logits for candidates in found]
        return out

    def encode(self, prompt: str | Sequence[int]) -> list[int]:
        """The prompt as token ids. PromptError where there are none, or more than the context holds."""
        tokens = self.tokenizer.encode(prompt) if isinstance(prompt, str) else list(prompt)
        if not len(prompt) or not tokens:  # a bos id alone is no prompt, and a tokenizer may drop spaces
            raise PromptError("the prompt is empty")
        if len(tokens) > self.context:
            raise PromptError(f"the prompt is {len(tokens)} tokens long, and the context has room for {self.context}")
        return tokens

    def close(self) -> None:
        """Lets go of workers, threads and the model file."""
        self._engine.close()
        self._team.close()
        self._model.close()

    def __enter__(self) -> "Llama":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _sequence(self, adapter: str | None) -> Any:
        """An empty sequence with the adapter of that name."""
        if adapter is None:
            return self._engine.sequence()
        if adapter not in self._adapters:
            raise AdapterError(f"no adapter is called {adapter} (loaded: {', '.join(self._adapters) or 'none'})")
        return self._engine.sequence(self._adapters.index(adapter))

    def _read(self, adapters: Mapping[str, str | os.PathLike]) -> list[LoraAdapter]:
        """The adapters in these folders, which are for this model."""
        self._adapters = tuple(adapters)
        found = [read_lora(folder) for folder in adapters.values()]
        for adapter in found:
            adapter.check(self.config)
        return found

    def _prefill(self, sequence, tokens: Sequence[int], reduction: Reduction) -> Candidates:
        """Runs the prompt, a batch at a time; candidates for what follows its last token."""
        most = self._engine.most_rows
        for first in range(0, len(tokens), most):
            rows = [Row(sequence, first + i, token) for i, token in enumerate(tokens[first : first + most])]
            is_last = first + len(rows) == len(tokens)
            found = self._engine.step(rows, [len(rows) - 1] if is_last else [], reduction)
        return found[0]

    def _check_types(self, weights: str | None, buffer: str, kv: str) -> None:
        held = self.config.weight_type.name.lower()
        if weights is not None and weights.lower() != held:
            raise ModelError(
                f"{self._model.path}: its weights are {held}, not {weights}; convert it again for another type"
            )
        if buffer not in ("q80", "f32"):
            raise ModelError(f"buffer float type {buffer}: it must be q80 or f32")
        if kv not in ("f16", "f32", "q80"):
            raise ModelError(f"kv float type {kv}: it must be f16, f32 or q80")
