"""The public API: a model and its tokenizer, ready to generate."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from dllama import embedded
from dllama.engine import memory
from dllama.engine.forward import MAX_ROWS, Forward, Row
from dllama.engine.sampler import Sampler, SamplerSettings
from dllama.errors import FileError, ModelError, PromptError
from dllama.formats import FloatType, ModelFile
from dllama.formats.files import reason
from dllama.kernels import jit, tags
from dllama.kernels.team import Team
from dllama.tokenizer import load_tokenizer

LOGIT_ROWS = 32
"""Rows whose logits ``Llama.logits`` asks for at a time."""


@dataclass(frozen=True)
class Piece:
    """One generated token and what it cost. The first one's inference is the prompt's, ``Llama.prefill_ms``.

    text: what it adds to the text, "" while a character is incomplete; generation_ms: all of it, the sampling too;
    inference_ms, transfer_ms: the forward pass, and waiting for other nodes in it; sent_bytes, received_bytes: by
    this node.
    """

    text: str
    token_id: int
    generation_ms: float
    inference_ms: float
    transfer_ms: float = 0.0
    sent_bytes: int = 0
    received_bytes: int = 0


class Llama:
    """A model loaded on this machine. Without paths it is the small model that comes with the package.

    nthreads: None takes every CPU this process may use; context: positions to make room for, None the model's own;
    weights_float_type: if given, the model file must hold this type; buffer_float_type: "q80" or "f32", what enters
    the products; kv_float_type: "f16", "f32" or "q80", how keys and values are kept; notify: called with a line when
    something takes long; progress: called with the bytes done and in all while weights are made ready.

    Raises FileError or FormatError for files that cannot be used, ModelError for a model and options that do not fit
    each other, OutOfMemoryError before loading what cannot fit, KernelError for kernels this CPU cannot run.
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
        notify: Callable[[str], None] = lambda line: None,
        progress: Callable[[int, int], None] = lambda done, total: None,
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
        kv_type = FloatType.parse(kv_float_type)
        memory.require(self.config, self.context, kv_type, self._model.path)
        self.nthreads = usable_cpus() if nthreads is None else nthreads
        if self.nthreads < 1:
            raise ValueError(f"nthreads is {nthreads}: it must be 1 or more")
        self.kernels = jit.ISA.name
        weight, act, cache = (tags.BY_NAME[name] for name in (self._weights_name, buffer_float_type, kv_float_type))
        if not jit.is_compiled(weight, act, cache):
            often = "once" if jit.KEEPS else f"at every start, for {jit.CACHE} cannot be written (set NUMBA_CACHE_DIR)"
            notify(f"compiling the {self.kernels} kernels for this machine: {often}, up to half a minute")
        self._team = Team(self.nthreads)
        try:
            self._forward = Forward(self._model, self._team, act, cache, self.context, progress)
        except OSError as error:
            raise FileError(jit.CACHE, f"the compiled kernels cannot be stored: {reason(error)}") from None
        jit.mark_compiled(weight, act, cache)
        self.prefill_ms = 0.0
        self.stop_reason: str | None = None
        self.load_ms = (time.perf_counter() - start) * 1e3

    def generate(
        self, prompt: str | Sequence[int], steps: int = 64, sampler: SamplerSettings | None = None
    ) -> Iterator[Piece]:
        """Pieces of the text that continues the prompt (text, or token ids), as they come.

        Ends at an end-of-text token, which is not yielded, after ``steps`` tokens or at the end of the context;
        ``stop_reason`` then says "eos", "steps" or "context". ``prefill_ms`` is the prompt's time. Raises PromptError
        for a prompt that is empty or longer than the context.
        """
        tokens = self.encode(prompt)
        choose = Sampler(sampler or SamplerSettings(), self.config.vocab_size)
        decoder = self.tokenizer.stream()
        sequence = self._forward.sequence()
        self.stop_reason = None
        start = time.perf_counter()
        logits = self._prefill(sequence, tokens)
        self.prefill_ms = (time.perf_counter() - start) * 1e3
        inference_ms = 0.0
        for produced in range(steps):
            start = time.perf_counter()
            if produced:
                if len(tokens) > self.context:
                    self.stop_reason = "context"
                    return
                logits = self._forward.forward([Row(sequence, len(tokens) - 1, tokens[-1])])[0]
                inference_ms = (time.perf_counter() - start) * 1e3
            token = choose.sample(logits, tokens)
            if token in self.tokenizer.eos_ids:
                self.stop_reason = "eos"
                return
            tokens.append(token)
            text = decoder.push(token)
            yield Piece(text, token, (time.perf_counter() - start) * 1e3, inference_ms)
        self.stop_reason = "steps"

    def logits(self, prompt: str | Sequence[int]) -> np.ndarray:
        """Logits after each token of a text (or of token ids), float32 [tokens, vocab_size]."""
        tokens = self.encode(prompt)
        sequence = self._forward.sequence()
        out = np.empty((len(tokens), self.config.vocab_size), np.float32)
        for first in range(0, len(tokens), LOGIT_ROWS):
            rows = [Row(sequence, first + i, token) for i, token in enumerate(tokens[first : first + LOGIT_ROWS])]
            out[first : first + len(rows)] = self._forward.forward(rows)
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
        """Ends the threads and lets go of the model file."""
        self._team.close()
        self._model.close()

    def __enter__(self) -> "Llama":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _prefill(self, sequence, tokens: Sequence[int]) -> np.ndarray:
        """Runs the prompt, a batch at a time; the logits after its last token."""
        for first in range(0, len(tokens), MAX_ROWS):
            rows = [Row(sequence, first + i, token) for i, token in enumerate(tokens[first : first + MAX_ROWS])]
            is_last = first + len(rows) == len(tokens)
            logits = self._forward.forward(rows, [len(rows) - 1] if is_last else [])
        return logits[0]

    @property
    def _weights_name(self) -> str:
        return self.config.weight_type.name.lower()

    def _check_types(self, weights: str | None, buffer: str, kv: str) -> None:
        held = self._weights_name
        if weights is not None and weights.lower() != held:
            raise ModelError(
                f"{self._model.path}: its weights are {held}, not {weights}; convert it again for another type"
            )
        if buffer not in ("q80", "f32"):
            raise ModelError(f"buffer float type {buffer}: it must be q80 or f32")
        if kv not in ("f16", "f32", "q80"):
            raise ModelError(f"kv float type {kv}: it must be f16, f32 or q80")


def usable_cpus() -> int:
    """CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
