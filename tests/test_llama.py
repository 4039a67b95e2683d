"""The API: what `Llama` generates, when it stops, and what it refuses."""

import itertools
import threading

import numpy as np
import pytest

from dllama import Llama, SamplerSettings
from dllama.embedded import model_path, tokenizer_path
from dllama.engine import memory
from dllama.errors import AdapterError, FileError, FormatError, ModelError, OutOfMemoryError, PromptError
from dllama.formats import FloatType, ModelFile
from dllama.lora import write_lora
from tests.engine import reference
from tests.engine.adapters import random_adapter
from tests.engine.models import BLOCKED, random_model
from tests.tokenizer.models import train

GREEDY = SamplerSettings(temperature=0)
WILD = SamplerSettings(temperature=1e6, top_p=1.0, seed=1)
PROMPT = "Question: Tom has 3 apples"
VOCAB = 400


@pytest.fixture(scope="module")
def embedded():
    with Llama() as llama:
        yield llama


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return train(tmp_path_factory.mktemp("tokenizer") / "tokenizer.model", vocab_size=VOCAB)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory):
    """A random model for the tokenizer above, with a context of 40 tokens."""
    shape = {**BLOCKED, "vocab_size": VOCAB, "seq_len": 40}
    path = tmp_path_factory.mktemp("model") / "tiny.m"
    random_model(path, shape, FloatType.Q40).close()
    return path


@pytest.fixture(scope="module")
def tiny(tiny_model, tokenizer):
    with Llama(tiny_model, tokenizer, nthreads=2) as llama:
        yield llama


def ids(pieces) -> list[int]:
    return [piece.token_id for piece in pieces]


def never_eos(llama) -> SamplerSettings:
    """A seed with which a wild sampler draws no end-of-text token in 60 draws."""
    for seed in range(100):
        settings = SamplerSettings(temperature=1e6, top_p=1.0, seed=seed)
        list(llama.generate([1], 60, settings))
        if llama.stop_reason != "eos":
            return settings
    raise AssertionError("every seed ends the text")


def test_the_embedded_model_without_any_path(embedded):
    with ModelFile(model_path()) as model:
        assert embedded.config == model.config
    assert embedded.config.weight_type is FloatType.Q40
    pieces = list(embedded.generate(PROMPT, 12, GREEDY))
    assert 0 < len(pieces) <= 12
    assert embedded.prefill_ms > 0 and embedded.load_ms > 0
    for piece in pieces[1:]:
        assert piece.generation_ms >= piece.inference_ms > 0
        assert (piece.transfer_ms, piece.sent_bytes, piece.received_bytes) == (0, 0, 0)


def test_text_and_its_token_ids_are_the_same_prompt(embedded):
    tokens = embedded.tokenizer.encode(PROMPT)
    assert ids(embedded.generate(PROMPT, 12, GREEDY)) == ids(embedded.generate(tokens, 12, GREEDY))
    assert tokens == embedded.tokenizer.encode(PROMPT), "the caller's list is left as it is"
    np.testing.assert_array_equal(embedded.logits(PROMPT), embedded.logits(np.array(tokens)))


def test_greedy_text_is_the_likeliest_token_of_the_logits(embedded):
    tokens = embedded.tokenizer.encode(PROMPT)
    produced = ids(embedded.generate(tokens, 6, GREEDY))
    exact = embedded.logits(tokens + produced)
    assert exact.shape == (len(tokens) + len(produced), embedded.config.vocab_size)
    assert exact.dtype == np.float32
    assert exact[len(tokens) - 1 : -1].argmax(1).tolist() == produced


def test_logits_of_more_tokens_than_one_step_takes(tiny_model, tokenizer):
    tokens = np.random.default_rng(1).integers(3, VOCAB, 40).tolist()
    with Llama(tiny_model, tokenizer, buffer_float_type="f32", kv_float_type="f32") as llama:
        found = llama.logits(tokens)
    with ModelFile(tiny_model) as model:
        expected = reference.logits(model, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_pieces_join_to_the_decoded_text(embedded):
    """Also where a character takes several tokens: a random text of byte pieces is full of those."""
    for settings in (GREEDY, WILD, SamplerSettings(temperature=1e6, top_p=1.0, seed=5)):
        prompt = embedded.tokenizer.encode("Tom has")
        pieces = list(embedded.generate(prompt, 60, settings))
        whole = embedded.tokenizer.decode(prompt + ids(pieces))
        streamed = "Tom has" + "".join(piece.text for piece in pieces)
        unfinished = whole[len(streamed) :]  # bytes of a character that did not end
        assert whole.startswith(streamed)
        assert set(unfinished) <= {"\ufffd"}


def test_a_seed_repeats_a_text(embedded):
    texts = [ids(embedded.generate(PROMPT, 20, SamplerSettings(temperature=1.5, seed=seed))) for seed in (7, 7, 8)]
    assert texts[0] == texts[1] != texts[2]


def test_generations_may_be_interleaved(tiny):
    prompts, settings = ([5, 6, 7], [8, 9]), never_eos(tiny)
    alone = [ids(tiny.generate(prompt, 10, settings)) for prompt in prompts]
    pairs = list(zip(*(tiny.generate(prompt, 10, settings) for prompt in prompts), strict=True))
    assert [ids(column) for column in zip(*pairs, strict=True)] == alone


def test_a_generation_may_be_left_unfinished(tiny):
    whole = ids(tiny.generate([5, 6, 7], 10, never_eos(tiny)))
    unfinished = tiny.generate([5, 6, 7], 10, never_eos(tiny))
    next(unfinished)
    unfinished.close()
    assert ids(tiny.generate([5, 6, 7], 10, never_eos(tiny))) == whole


def test_stops_after_the_steps(tiny):
    for steps in (0, 1, 5):
        assert len(list(tiny.generate([5], steps, never_eos(tiny)))) == steps
        assert tiny.stop_reason == "steps"


def test_stops_at_the_end_of_the_context(tiny):
    """Every position can be fed; the token that the last one gives is the text's last."""
    settings = never_eos(tiny)
    pieces = list(tiny.generate([5] * 3, 1000, settings))
    assert tiny.stop_reason == "context"
    assert len(pieces) == tiny.context - 3 + 1
    pieces = list(tiny.generate([5] * tiny.context, 1000, settings))
    assert tiny.stop_reason == "context"
    assert len(pieces) == 1


def test_stops_at_an_end_of_text_token_without_yielding_it(tiny):
    eos = tiny.tokenizer.eos_ids[0]
    for seed in range(200):
        pieces = list(tiny.generate([5], 38, SamplerSettings(temperature=1e6, top_p=1.0, seed=seed)))
        assert eos not in ids(pieces)
        if tiny.stop_reason == "eos":
            assert len(pieces) < 38
            return
    raise AssertionError("no seed of 200 drew the end of the text")


@pytest.mark.parametrize("prompt", ["", []])
def test_empty_prompts_are_refused(tiny, prompt):
    for run in (tiny.logits, lambda prompt: list(tiny.generate(prompt))):
        with pytest.raises(PromptError, match="the prompt is empty"):
            run(prompt)


def test_a_prompt_of_nothing_but_dropped_spaces_is_empty(tmp_path, tiny_model):
    path = train(tmp_path / "trimming.model", vocab_size=VOCAB, remove_extra_whitespaces=True, bos_id=-1)
    with Llama(tiny_model, path, nthreads=1) as llama, pytest.raises(PromptError, match="the prompt is empty"):
        list(llama.generate("  "))


def test_prompts_beyond_the_context_are_refused(tiny):
    with pytest.raises(PromptError, match="the prompt is 41 tokens long, and the context has room for 40"):
        list(tiny.generate([5] * 41))
    with pytest.raises(PromptError, match="tokens long, and the context has room for 40"):
        list(tiny.generate("apples and pears " * 50))


@pytest.mark.parametrize("token", [-1, VOCAB])
def test_ids_outside_the_vocabulary_are_refused(tiny, token):
    with pytest.raises(ModelError, match=f"token {token} is outside the vocabulary of {VOCAB}"):
        list(tiny.generate([5, token]))
    assert len(tiny.logits([5])) == 1, "an error leaves the model usable"


def test_a_shorter_context_may_be_asked_for(tiny_model, tokenizer):
    with Llama(tiny_model, tokenizer, context=8) as llama:
        assert llama.context == 8
        assert len(list(llama.generate([5] * 6, 100, never_eos(llama)))) == 3
        assert llama.stop_reason == "context"


@pytest.mark.parametrize("kv", ["f16", "f32", "q80"])
@pytest.mark.parametrize("buffers", ["q80", "f32"])
def test_every_choice_of_buffers_and_cache_predicts_alike(tiny_model, tokenizer, buffers, kv):
    tokens = list(range(3, 33))
    with ModelFile(tiny_model) as model:
        expected = reference.logits(model, tokens)
    with Llama(tiny_model, tokenizer, nthreads=1, buffer_float_type=buffers, kv_float_type=kv) as llama:
        found = llama.logits(tokens)
    difference = np.linalg.norm(found - expected, axis=1) / np.linalg.norm(expected, axis=1)
    assert difference.max() < 0.1


REFUSED = [
    (dict(weights_float_type="q80"), ModelError, "tiny.m: its weights are q40, not q80; convert it again"),
    (dict(buffer_float_type="f16"), ModelError, "buffer float type f16: it must be q80 or f32"),
    (dict(kv_float_type="q40"), ModelError, "kv float type q40: it must be f16, f32 or q80"),
    (dict(context=41), ModelError, "tiny.m: a context of 41 tokens was asked for, and the model has 40"),
    (dict(context=0), ModelError, "tiny.m: a context of 0 tokens was asked for"),
    (dict(tokenizer=tokenizer_path()), ModelError, "tokenizer.model: the tokenizer has .* they do not belong together"),
    (dict(tokenizer=None), ModelError, "a model and its tokenizer come together"),
    (dict(model=None), ModelError, "a model and its tokenizer come together"),
    (dict(model="nowhere.m"), FileError, "nowhere.m: no such file"),
    (dict(model=__file__), FormatError, "test_llama.py: not a model"),
    (dict(tokenizer=__file__), FormatError, "test_llama.py: "),
]


@pytest.mark.parametrize("options, error, message", REFUSED, ids=[", ".join(options) for options, *_ in REFUSED])
def test_what_does_not_fit_together_is_refused(tiny_model, tokenizer, options, error, message):
    options = {"model": tiny_model, "tokenizer": tokenizer, **options}
    with pytest.raises(error, match=message) as caught:
        Llama(options.pop("model"), options.pop("tokenizer"), **options)
    assert "\n" not in str(caught.value)


def test_weights_of_the_type_that_is_asked_for(tiny_model, tokenizer):
    Llama(tiny_model, tokenizer, weights_float_type="Q40").close()


def test_too_little_memory_is_told_before_loading(tiny_model, tokenizer, monkeypatch):
    monkeypatch.setenv(memory.LIMIT_VARIABLE, "1000000")
    with pytest.raises(OutOfMemoryError, match="tiny.m: .* of memory needed for a context of 40 tokens"):
        Llama(tiny_model, tokenizer)


@pytest.fixture(scope="module")
def adapters(tiny_model, tmp_path_factory):
    """Two folders with an adapter for the tiny model, by name."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("one", "other")}
    with ModelFile(tiny_model) as model:
        for seed, folder in enumerate(folders.values()):
            write_lora(folder, random_adapter(model.config, seed), "tiny")
    return folders


def test_each_text_may_have_its_own_adapter(tiny_model, tiny, tokenizer, adapters):
    prompt = [5, 6, 7]
    alone = []
    for name, folder in adapters.items():
        with Llama(tiny_model, tokenizer, nthreads=2, adapters={name: folder}) as llama:
            alone.append(ids(llama.generate(prompt, 10, GREEDY, adapter=name)))
    alone.append(ids(tiny.generate(prompt, 10, GREEDY)))
    assert alone[0] != alone[1] != alone[2] != alone[0]
    with Llama(tiny_model, tokenizer, nthreads=2, adapters=adapters) as llama:
        texts = [llama.generate(prompt, 10, GREEDY, adapter=name) for name in ("one", "other", None)]
        columns = zip(*itertools.zip_longest(*texts), strict=True)
        assert [ids(filter(None, column)) for column in columns] == alone
        assert abs(llama.logits(prompt, adapter="one") - llama.logits(prompt)).max() > 0.1
        np.testing.assert_array_equal(llama.logits(prompt), tiny.logits(prompt))
        with pytest.raises(AdapterError, match=r"no adapter is called third \(loaded: one, other\)"):
            llama.logits(prompt, adapter="third")
    with pytest.raises(AdapterError, match=r"no adapter is called one \(loaded: none\)"):
        tiny.logits(prompt, adapter="one")


def test_adapters_of_other_models_are_refused(tmp_path, adapters):
    with pytest.raises(
        AdapterError, match="one0: for a model whose .* takes .* values and gives .*, and it is .* here"
    ):
        Llama(adapters={"one": adapters["one"]})
    with pytest.raises(FileError, match="adapter_config.json: no such file"):
        Llama(adapters={"one": tmp_path})


def test_adapters_count_as_memory(tiny_model, tokenizer, adapters, monkeypatch):
    with ModelFile(tiny_model) as model:
        needed = memory.needed_bytes(model.config, 40, FloatType.F16)
    monkeypatch.setenv(memory.LIMIT_VARIABLE, str(needed + 1000))
    Llama(tiny_model, tokenizer).close()
    with pytest.raises(OutOfMemoryError, match="tiny.m: .* of memory needed .* available beside the adapters"):
        Llama(tiny_model, tokenizer, adapters=adapters)


def test_loading_tells_how_far_it_is(tiny_model, tokenizer):
    seen = []
    Llama(tiny_model, tokenizer, progress=lambda *step: seen.append(step)).close()
    assert seen == sorted(seen)
    assert seen[-1] == ("loading weights", seen[-1][2], seen[-1][2])


def test_closing_ends_the_threads_and_may_be_repeated(tiny_model, tokenizer):
    before = threading.active_count()
    with Llama(tiny_model, tokenizer, nthreads=3) as llama:
        assert llama.nthreads == 3
        assert threading.active_count() == before + 2
    assert threading.active_count() == before
    llama.close()
    with pytest.raises(RuntimeError, match="closed"):
        llama.logits([5])
