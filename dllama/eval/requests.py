"""What the harness asks a model for, as requests for `lanes`."""

from collections.abc import Sequence

from dllama.engine.candidates import Candidates
from dllama.engine.sampler import Sampler
from dllama.likelihood import negative_log_likelihood
from dllama.tokenizer import Tokenizer


class Scoring:
    """How likely some tokens are after others, at least one of each.

    log_likelihood: the sum of ln p;  is_greedy: whether each of them is the likeliest one at its place
    """

    def __init__(self, context: Sequence[int], continuation: Sequence[int]):
        self.tokens = [*context, *continuation[:-1]]
        self.wanted_from = len(context) - 1
        self.log_likelihood, self.is_greedy = 0.0, True
        self._expected = iter(continuation)

    def take(self, candidates: Candidates) -> None:
        """``candidates`` are those of the whole vocabulary. Raises ModelError where they are no distribution."""
        token = next(self._expected)
        self.is_greedy &= int(candidates.logits.argmax()) == token
        self.log_likelihood -= negative_log_likelihood(candidates.logits[None], [token])


class Generation:
    """The text that continues a prompt of at least one token.

    It ends before the first of the texts ``until``, at an end-of-text token or a special one that ``until`` spells out,
    and after ``most`` tokens.
    """

    def __init__(self, prompt: Sequence[int], most: int, until: Sequence[str], sampler: Sampler, tokenizer: Tokenizer):
        self.tokens = list(prompt)
        self.wanted_from = len(prompt) - 1
        self._most, self._sampler, self._tokenizer = most, sampler, tokenizer
        self._until = [stop for stop in until if stop]
        self._ends = {*tokenizer.eos_ids, *(tokenizer.special[stop] for stop in until if stop in tokenizer.special)}
        self._ids: list[int] = []
        self._decoder, self._so_far = tokenizer.stream(), ""

    def take(self, candidates: Candidates) -> None:
        """Chooses the next token. Raises ModelError where the candidates are no distribution."""
        token = self._sampler.choose(candidates)
        if token in self._ends:
            return
        self._ids.append(token)
        self._so_far += self._decoder.push(token)
        if len(self._ids) < self._most and not any(stop in self._so_far for stop in self._until):
            self.tokens.append(token)

    @property
    def text(self) -> str:
        """What has been generated, decoded as a text of its own, as the harness does with models of transformers."""
        text = self._tokenizer.decode(self._ids)
        for stop in self._until:
            text = text.split(stop)[0]
        return text
