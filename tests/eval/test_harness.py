"""The adapter to lm-evaluation-harness against the harness's own model of transformers, on the same weights."""

import pytest

pytest.importorskip("lm_eval", reason="the harness: pip install '.[eval]'")
pytest.importorskip("torch", reason="its models are compared with: pip install '.[eval]'")

from lm_eval.api.instance import Instance  # noqa: E402

from dllama.errors import FileError, ModelError  # noqa: E402
from dllama.eval.harness import DllamaLM  # noqa: E402
from tests.eval.models import CONTEXT  # noqa: E402

EXACT = {"buffer_float_type": "f32", "kv_float_type": "f32", "nthreads": 1}
LONG = "def read(path):\n    with open(path) as file:\n        return file.read()\n" * 8
QUESTION = "Question: what is it?\nAnswer:"
PAIRS = [
    ("", "Hello world"),
    ("Hello", " world"),
    ("Hello ", "world, naïve café"),
    *((QUESTION, answer) for answer in (" yes", " no", " it is not", " yes")),
    ("<|im_start|>user\nHi<|im_end|>\n", "<|im_start|>assistant"),
    (LONG, " and the end"),
]
PROMPTS = ["Hello world", QUESTION, "1234567890 +", LONG]


@pytest.fixture(scope="module")
def reference(checkpoint):
    """The harness's own model."""
    huggingface = pytest.importorskip("lm_eval.models.huggingface", reason="pip install '.[eval]'")
    return huggingface.HFLM(pretrained=str(checkpoint), device="cpu", dtype="float32", batch_size=1)


@pytest.fixture(scope="module")
def ours(checkpoint):
    lm = DllamaLM(model=checkpoint / "model.m", tokenizer=checkpoint / "tokenizer.t", **EXACT)
    yield lm
    lm.close()


def instances(kind: str, *arguments: tuple) -> list[Instance]:
    return [Instance(kind, {}, each, i) for i, each in enumerate(arguments)]


def assert_same_likelihoods(found, expected):
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert [value for value, _ in found] == pytest.approx([value for value, _ in expected], abs=1e-3)


def test_likelihoods(ours, reference):
    asked = instances("loglikelihood", *PAIRS)
    assert_same_likelihoods(ours.loglikelihood(asked), reference.loglikelihood(asked))


def test_a_context_of_spaces_is_none(ours):
    spaces, none = ours.loglikelihood(instances("loglikelihood", (" ", "Hello"), ("", " Hello")))
    assert spaces == pytest.approx(none, abs=1e-6)


def test_a_continuation_that_the_model_writes_is_greedy(ours, reference):
    prompt = instances("generate_until", (QUESTION, {"until": [], "max_gen_toks": 6}))
    asked = instances("loglikelihood", (QUESTION, ours.generate_until(prompt)[0]))
    assert ours.loglikelihood(asked)[0][1] == reference.loglikelihood(asked)[0][1]


def test_likelihoods_of_texts_of_several_contexts(ours, reference):
    asked = instances("loglikelihood_rolling", ("Hello world",), (LONG,), (LONG[:200],))
    assert len(ours.tok_encode(LONG)) > 2 * CONTEXT
    expected = reference.loglikelihood_rolling(asked)
    assert ours.loglikelihood_rolling(asked) == pytest.approx(expected, abs=1e-3)


def test_texts(ours, reference):
    asked = instances("generate_until", *((prompt, {"until": [], "max_gen_toks": 12}) for prompt in PROMPTS))
    written = reference.generate_until(asked)
    assert ours.generate_until(asked) == written
    stop = next(text for text in written if len(text) > 6)[3:5]
    asked = instances(
        "generate_until", *((prompt, {"until": ["\n\n", stop], "max_new_tokens": 12}) for prompt in PROMPTS)
    )
    expected = reference.generate_until(asked)
    assert ours.generate_until(asked) == expected != written


@pytest.mark.parametrize("batch_size", ["1", 3, 100])
def test_any_number_at_a_time(checkpoint, ours, batch_size):
    lm = DllamaLM(batch_size, model=checkpoint / "model.m", tokenizer=checkpoint / "tokenizer.t", **EXACT)
    scored = instances("loglikelihood", *PAIRS)
    assert_same_likelihoods(lm.loglikelihood(scored), ours.loglikelihood(scored))
    written = instances("generate_until", *((prompt, {"until": [], "max_gen_toks": 12}) for prompt in PROMPTS))
    assert lm.generate_until(written) == ours.generate_until(written)
    lm.close()


def test_over_a_cluster(checkpoint, ours):
    model = {"model": checkpoint / "model.m", "tokenizer": checkpoint / "tokenizer.t"}
    lm = DllamaLM.create_from_arg_obj({**model, **EXACT, "local_workers": 1}, {"batch_size": 4, "device": "cuda:0"})
    scored = instances("loglikelihood", *PAIRS)
    assert_same_likelihoods(lm.loglikelihood(scored), ours.loglikelihood(scored))
    written = instances("generate_until", (QUESTION, {"until": [], "max_gen_toks": 12}))
    assert lm.generate_until(written) == ours.generate_until(written)
    lm.close()


def test_sampling_is_the_same_for_the_same_seed(checkpoint, ours):
    hot = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_p": 0.9, "top_k": 50}
    asked = instances("generate_until", (QUESTION, hot), (QUESTION, hot), (QUESTION, {"until": [], "max_gen_toks": 12}))
    first, second, greedy = ours.generate_until(asked)
    assert [first, second, greedy] == ours.generate_until(asked)
    assert len({first, second, greedy}) == 3


@pytest.mark.parametrize("add_generation_prompt", [True, False])
def test_conversations(ours, reference, add_generation_prompt):
    messages = [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "world"}]
    messages = messages[: 1 if add_generation_prompt else 2]
    text = ours.apply_chat_template(messages, add_generation_prompt)
    assert text == reference.apply_chat_template(messages, add_generation_prompt)
    assert ours.tok_encode(text) == reference.tok_encode(text)
    assert ours.chat_template(True) == reference.chat_template(True)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({"modle": "a.m"}, "model_args: No such option"),
        ({"model": "a.m"}, "model_args: --model needs --tokenizer with it"),
        ({"nthreads": "many"}, "model_args: .*--nthreads.*'many'"),
        ({"insecure": "yes"}, "model_args: .*--insecure"),
        ({"workers": "10.0.0.1+10.0.0.2", "local_workers": 2}, "either --workers or --local-workers"),
        ({"batch_size": 0}, "batch_size is 0: it must be 1 or more"),
        ({"max_gen_toks": "few"}, "max_gen_toks is few"),
        ({"context": 10**6}, "a context of 1000000 tokens was asked for"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(ModelError, match=message) as caught:
        DllamaLM(**arguments)
    assert "\n" not in str(caught.value)


def test_a_file_that_is_missing(tmp_path):
    with pytest.raises(FileError, match="missing.m"):
        DllamaLM(model=tmp_path / "missing.m", tokenizer=tmp_path / "missing.t")


@pytest.mark.parametrize(
    "asked, message",
    [
        ({"repetition_penalty": 2}, "repetition_penalty: the engine takes only temperature"),
        ({"num_beams": 4}, "num_beams above 1"),
        ({"temperature": -1, "do_sample": True}, "temperature is -1"),
        ({"max_gen_toks": CONTEXT}, "leave no room for a prompt in a context of 96"),
    ],
)
def test_generation_that_the_engine_cannot_do(ours, asked, message):
    with pytest.raises(ModelError, match=message):
        ours.generate_until(instances("generate_until", ("Hello", {"until": [], "max_gen_toks": 5, **asked})))


def test_a_continuation_longer_than_the_context(ours):
    with pytest.raises(ModelError, match="a continuation of .* is longer than the context of 96"):
        ours.loglikelihood(instances("loglikelihood", ("Hello", LONG)))
