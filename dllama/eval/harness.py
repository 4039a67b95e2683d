"""This engine as a model of lm-evaluation-harness.

``lm_eval --model dllama`` knows it once this module is imported. ``dllama eval`` does so, and so do the tasks in TASKS;
lm-evaluation-harness 0.4.13 reads no entry points, and a later one that does finds it by these.
"""

import logging
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any
from weakref import finalize

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from dllama.engine.candidates import Reduction
from dllama.engine.memory import available_bytes, kv_bytes_per_token
from dllama.engine.sampler import Sampler, SamplerSettings
from dllama.errors import ModelError
from dllama.eval.arguments import open_model
from dllama.eval.lanes import Request, run
from dllama.eval.requests import Generation, Scoring
from dllama.formats import FloatType

log = logging.getLogger(__name__)

MAX_LANES = 8
"""Requests at a time where the batch size is "auto" and memory allows."""
SAMPLING = ("temperature", "top_k", "top_p", "min_p")


@register_model("dllama")
class DllamaLM(TemplateLM):
    """A model file, on this machine or over a cluster.

    batch_size: requests at a time, "auto" for as many as memory allows, up to MAX_LANES; max_batch_size: the most of
    those; device: what the harness passes on to every model, not used; max_gen_toks: tokens to generate where a task
    does not say; seed: of tasks that sample; arguments: see ``open_model``

    Raises ModelError for arguments that make no sense, and what loading a model raises.
    """

    def __init__(
        self,
        batch_size: int | str = "auto",
        max_batch_size: int | None = None,
        device: str | None = None,
        max_gen_toks: int = 256,
        seed: int = 0,
        **arguments: Any,
    ):
        super().__init__()
        self._batch_size = None if str(batch_size).startswith("auto") else _count("batch_size", batch_size)
        self._most = _count("max_batch_size", max_batch_size or MAX_LANES)
        self.max_gen_toks, self._seed = _count("max_gen_toks", max_gen_toks), seed
        self._kv_type = FloatType.parse(str(arguments.get("kv_float_type", "f16")))
        self._llama, stack = open_model(arguments)
        self._close = finalize(self, stack.close)
        self.tokenizer = self._llama.tokenizer
        self._tokenizer_name = str(arguments.get("tokenizer", "embedded")).replace("/", "__")

    def close(self) -> None:
        """Lets go of the model and its workers, as the end of the program does."""
        self._close()

    @property
    def tokenizer_name(self) -> str:
        """What the harness files prepared requests under."""
        return self._tokenizer_name

    @property
    def max_length(self) -> int:
        """Tokens that the model sees at a time."""
        return self._llama.context

    @property
    def eot_token_id(self) -> int:
        """Raises ModelError where the tokenizer has none."""
        return self._required([*self.tokenizer.eos_ids], "end-of-text token")

    @property
    def prefix_token_id(self) -> int:
        """What comes before a text: the bos token that the tokenizer puts there, or the end of the text before.

        Raises ModelError where there is neither. (A file may have a bos id that its model was never shown.)
        """
        return self._required([*self.tokenizer.encode(""), *self.tokenizer.eos_ids], "bos or end-of-text token")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        """Ids of a text, as transformers has them: special tokens that it spells out are such, which is how a chat
        template writes them, and a bos token is not put before one that is there already."""
        if add_special_tokens is None:
            spelled = {i: text for text, i in self.tokenizer.special.items()}.get(self.tokenizer.bos_id)
            add_special_tokens = not (spelled and string.startswith(spelled))
        return self.tokenizer.encode(string, bos=add_special_tokens, special=True)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as the tokenizer's chat template writes it; the last message is left open for the model to
        go on where ``add_generation_prompt`` is false. Raises ModelError where there is no template, or it refuses."""
        from jinja2 import TemplateError
        from transformers.utils.chat_template_utils import render_jinja_template

        if not self.tokenizer.chat_template:
            raise ModelError("the tokenizer has no chat template: leave out --apply_chat_template")
        spelled = {i: text for text, i in self.tokenizer.special.items()}
        try:
            texts, _ = render_jinja_template(
                conversations=[chat_history],
                chat_template=self.tokenizer.chat_template,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                bos_token=spelled.get(self.tokenizer.bos_id, ""),
                eos_token=next((spelled.get(i, "") for i in self.tokenizer.eos_ids), ""),
            )
        except TemplateError as error:
            raise ModelError(f"the chat template refuses a conversation: {error}") from None
        return texts[0]

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of each text, all tokens of it, bos included where the tokenizer puts one, after the prefix token.

        Texts longer than the context are cut into windows that do not overlap but for one token.
        """
        scorings, owners = [], []
        for index, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            for window in get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1):
                scorings.append(self._scoring(*make_disjoint_window(window)))
                owners.append(index)
        for _ in self._run(scorings, Reduction.ALL, "Rolling log-likelihoods", disable_tqdm):
            pass
        totals = [0.0] * len(requests)
        for owner, scoring in zip(owners, scorings, strict=True):
            totals[owner] += scoring.log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """What the model writes after each prompt. A prompt that leaves no room for it in the context loses its start.

        Raises ModelError for generation arguments that this engine does not have.
        """
        generations, groups = [], defaultdict(list)
        for index, request in enumerate(requests):
            generation, reduction = self._generation(*request.args, self._seed + index)
            generations.append(generation)
            groups[reduction].append(index)
        for reduction, members in groups.items():
            group = [generations[index] for index in members]
            for done in self._run(group, reduction, "Texts", disable_tqdm):
                self.cache_hook.add_partial("generate_until", requests[members[done]].args, group[done].text)
        return [generation.text for generation in generations]

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], disable_tqdm: bool = False, **_
    ) -> list[tuple[float, bool]]:
        """ln p of each continuation and whether it is what greedy sampling writes; 0 and True for no tokens."""
        answers = [(0.0, True)] * len(requests)
        asked = [i for i, (_, _, continuation) in enumerate(requests) if continuation]
        scorings = [self._scoring(*requests[i][1:]) for i in asked]
        for done in self._run(scorings, Reduction.ALL, "Log-likelihoods", disable_tqdm):
            index, scoring = asked[done], scorings[done]
            answers[index] = scoring.log_likelihood, scoring.is_greedy
            self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        return answers

    def _scoring(self, context: list[int], continuation: list[int]) -> Scoring:
        if len(continuation) > self.max_length:
            raise ModelError(
                f"a continuation of {len(continuation)} tokens is longer than the context of {self.max_length}"
            )
        context = context or [self.prefix_token_id]
        return Scoring(self._shortened(context, self.max_length + 1 - len(continuation)), continuation)

    def _generation(self, prompt: str, asked: dict, seed: int) -> tuple[Generation, Reduction]:
        asked = normalize_gen_kwargs(asked, self.max_gen_toks)
        until, most = asked.pop("until"), asked.pop("max_gen_toks")
        asked.pop("do_sample")  # where it is false, the temperature is 0
        values = {name: asked.pop(name) for name in SAMPLING if name in asked}
        if asked.pop("num_beams", 1) != 1 or asked:
            names = ", ".join(asked) or "num_beams above 1"
            raise ModelError(f"generation_kwargs: {names}: the engine takes only {', '.join(SAMPLING)}")
        if not 0 < most < self.max_length:
            raise ModelError(
                f"{most} tokens to generate leave no room for a prompt in a context of {self.max_length}: "
                "--gen_kwargs max_gen_toks=N asks for fewer"
            )
        try:
            settings = SamplerSettings(**{"temperature": 0.0, "top_p": 1.0, **values, "seed": seed})
        except (ValueError, TypeError) as error:
            raise ModelError(f"generation_kwargs: {error}") from None
        tokens = self._shortened(self.tok_encode(prompt) or [self.prefix_token_id], self.max_length - most)
        sampler = Sampler(settings, self._llama.config.vocab_size)
        return Generation(tokens, most, until, sampler, self.tokenizer), sampler.reduction([])

    def _shortened(self, tokens: list[int], room: int) -> list[int]:
        if len(tokens) > room:
            log.warning("%d tokens where the context has room for %d: the first are left out", len(tokens), room)
        return tokens[-room:]

    def _run(self, requests: Sequence[Request], reduction: Reduction, name: str, disable_tqdm: bool) -> Iterator[int]:
        done = run(self._llama._engine, requests, reduction, self._lanes(requests))
        yield from tqdm(done, name, len(requests), disable=disable_tqdm)

    def _lanes(self, requests: Iterable[Request]) -> int:
        """How many of the requests to run at a time."""
        if self._batch_size is not None:
            return self._batch_size
        available = available_bytes()
        if available is None:
            return 1
        longest = max((len(request.tokens) for request in requests), default=1) + self.max_gen_toks
        nodes = 1 if self._llama.plan is None else len(self._llama.plan.nodes)
        each = min(longest, self.max_length) * kv_bytes_per_token(self._llama.config, self._kv_type, nodes)
        return max(1, min(self._most, available // (2 * each)))  # half of it: others use the machine as well

    def _required(self, ids: list[int], what: str) -> int:
        if not ids:
            raise ModelError(f"the tokenizer has no {what}, which the harness needs")
        return ids[0]


def _count(name: str, value: int | str) -> int:
    if not str(value).isdecimal() or int(value) < 1:
        raise ModelError(f"{name} is {value}: it must be 1 or more")
    return int(value)
