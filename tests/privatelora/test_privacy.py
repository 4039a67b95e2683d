"""Every byte that a cloud receives while texts are written, and that nothing private is among them.

What the cloud gets, it may think about: the rows that enter its layers come from the text, and with no layers at the
edge they are rows of the embedding, which it has. What these tests say is that nothing goes there beside those rows and
the answers M·A·x.
"""

import struct

import msgpack
import numpy as np
import pytest

from dllama import SamplerSettings
from dllama.cluster import wire
from dllama.embedded import model_path
from dllama.engine.candidates import reduce
from dllama.formats import FloatType, ModelFile, quantize
from dllama.privatelora.adapter import write_adapter
from dllama.privatelora.passage import stops, targets_of
from dllama.privatelora.travel import Rows
from dllama.targets import TARGETS
from tests.cluster.test_readme import FIELD, documented
from tests.privatelora.adapters import strong_halves
from tests.privatelora.nodes import EXACT, CloudProcess, open_llama
from tests.privatelora.recorder import Recorder, messages

RANKS = 64, 32
STEPS = 14
TEXTS = {
    "greedy": ("Question: Tom has 3 apples and buys 4 more. How many", SamplerSettings(temperature=0)),
    "sampled": ("Anna Smith lives in 7 Park Street, her secret is 8", SamplerSettings(1.5, top_p=1.0, seed=4)),
}
WHICH = [("greedy", "f32"), ("sampled", "f32"), ("greedy", "q80"), ("sampled", "f16")]
PROMPT_TOKENS = 16
"""Both prompts are cut to so many."""


class Heard:
    """A text as the edge wrote it, and all that went to the cloud for it.

    stream: the bytes;  messages: the messages in them, with their payloads;  prompt, tokens: token ids;  text: as it
    was read and written;  logits: float32 [rows, vocab], all that the edge has computed
    """

    def __init__(self, kind: str, form: str, cloud, folder):
        self.form = FloatType.parse(form)
        self.logits = []

        def note(row, *args):
            self.logits.append(row.copy())
            return reduce(row, *args)

        prompt, sampler = TEXTS[kind]
        with Recorder(cloud.port) as recorder, pytest.MonkeyPatch.context() as patch:
            patch.setattr("dllama.privatelora.edge.reduce", note)
            with open_llama(recorder.address, adapter=folder, form=form) as llama:
                self.prompt = llama.encode(prompt)[:PROMPT_TOKENS]
                pieces = list(llama.generate(self.prompt, STEPS, sampler))
                assert len(pieces) == STEPS, "it ended early"
            (stream,) = recorder.streams
        self.stream = bytes(stream)
        self.frames = messages(self.stream)
        self.messages = [wire.decode(frames) for frames in self.frames]
        self.tokens = [piece.token_id for piece in pieces]
        self.text = prompt + "".join(piece.text for piece in pieces)

    def of(self, kind: type) -> list[tuple]:
        return [(message, payload) for message, payload in self.messages if type(message) is kind]


@pytest.fixture(scope="module")
def base():
    return ModelFile(model_path())


@pytest.fixture(scope="module")
def pair(base):
    return strong_halves(base.config, tuple(TARGETS), ranks=RANKS)


@pytest.fixture(scope="module")
def cloud():
    with CloudProcess(model_path(), types=EXACT) as cloud:
        assert cloud.address
        yield cloud


@pytest.fixture(scope="module")
def heard(cloud, pair, tmp_path_factory):
    """`Heard` for a kind of text and a form of what travels."""
    folder = tmp_path_factory.mktemp("adapter")
    write_adapter(folder, *pair)
    return {(kind, form): Heard(kind, form, cloud, folder) for kind, form in WHICH}


def windows(data: np.ndarray, at_every: int = 1) -> np.ndarray:
    """Of rows of bytes, uint8 [rows, bytes]: all 8 in a row, from each so-many-th byte on, as integers. Those of few
    different bytes, which could be anything, are left out."""
    spans = np.lib.stride_tricks.sliding_window_view(data, 8, 1)[:, ::at_every].reshape(-1, 8)
    varied = np.count_nonzero(np.diff(np.sort(spans, axis=1)), axis=1) >= 4
    return np.unique(np.ascontiguousarray(spans[varied]).view(np.uint64).ravel())


def found_in(stream: bytes, secrets: np.ndarray, value_bytes: int) -> int:
    """How many spans of 8 bytes of the secrets, uint8 [rows, bytes], from each value on, are in the stream."""
    return len(np.intersect1d(windows(np.frombuffer(stream, np.uint8)[None]), windows(secrets, value_bytes)))


def as_values(array: np.ndarray) -> dict[str, tuple[np.ndarray, int]]:
    """Rows of floats in every form that one might think of, uint8 [rows, bytes], and the bytes of a value."""
    array = np.ascontiguousarray(array, np.float32)
    assert array.shape[1] % 32 == 0
    upper = (array.view(np.uint32) >> 16).astype(np.uint16)
    return {
        "f64": (array.astype(np.float64).view(np.uint8), 8),
        "f32": (array.view(np.uint8), 4),
        "f16": (array.astype(np.float16).view(np.uint8), 2),
        "bf16": (upper.view(np.uint8), 2),
        "q80": (quantize(array, FloatType.Q80), 1),
    }


EVERY = pytest.mark.parametrize("which", WHICH)


@EVERY
def test_the_recorder_hears(heard, base, which):
    """What is searched for below would be found: here are rows that do travel, the embeddings of the tokens."""
    one = heard[which]
    rows = Rows(one.form, base.config.dim).encode(base.f32("embedding")[one.prompt])
    assert rows.tobytes() in one.stream
    value = {FloatType.F32: 4, FloatType.F16: 2, FloatType.Q80: 1}[one.form]
    assert found_in(one.stream, rows.reshape(len(one.prompt), -1), value) > 50 * len(set(one.prompt))


@EVERY
def test_no_token_ids(heard, which):
    one = heard[which]
    ids = one.prompt + one.tokens
    packed = [msgpack.packb(token) for token in ids]
    for count in (3, 4):
        for first in range(len(ids) - count + 1):
            few = ids[first : first + count]
            for form in ("<u2", ">u2", "<u4", ">u4", "<u8", ">u8", "<f4", ">f4", "<f8", ">f8"):
                assert np.array(few).astype(form).tobytes() not in one.stream, few
            assert b"".join(packed[first : first + count]) not in one.stream, few


@EVERY
def test_no_text(heard, which):
    one = heard[which]
    words = {word for word in one.text.split() if len(word) > 3}
    assert len(words) > 5
    for word in words:
        for written in (word, word.lower(), word.upper()):
            for encoding in ("utf-8", "utf-16-le", "utf-16-be", "utf-32-le"):
                assert written.encode(encoding) not in one.stream, word


@EVERY
def test_nothing_of_m(heard, pair, which):
    matrices = np.concatenate([pair[1].m(*place) for place in pair[1].shape.places()])
    for name, (rows, value) in as_values(matrices).items():
        assert found_in(heard[which].stream, rows, value) == 0, name
    transposed = matrices.reshape(-1, *pair[1].shape.m).swapaxes(1, 2).reshape(-1, RANKS[1])
    for name, (columns, value) in as_values(transposed).items():
        assert found_in(heard[which].stream, columns, value) == 0, name


@EVERY
def test_no_logits(heard, which):
    one = heard[which]
    logits = np.array(one.logits)
    assert logits.shape == (STEPS, 1152)
    temperature = TEXTS[which[0]][1].temperature or 1.0
    scores = np.exp(logits / temperature - (logits / temperature).max(1, keepdims=True))
    for numbers in (logits, scores, scores / scores.sum(1, keepdims=True)):
        for name, (rows, value) in as_values(numbers).items():
            assert found_in(one.stream, rows, value) == 0, name
    chosen = logits[np.arange(STEPS), one.tokens]
    for value in chosen:
        assert struct.pack("<f", value) not in one.stream


@EVERY
def test_the_fields_are_those_of_the_page(heard, which):
    one = heard[which]
    page = documented()
    kinds = [type(message) for message, _ in one.messages]
    assert kinds[:2] == [wire.Hello, wire.Open] and kinds[-1] is wire.Bye
    assert set(kinds[2:-1]) == {wire.Enter, wire.Answer}
    for (message, payload), (header, *_) in zip(one.messages, one.frames, strict=True):
        number, content = page[type(message).__name__]
        fields = [name for name, _ in FIELD.findall(content)]
        assert list(message._fields) == fields
        unpacked = msgpack.unpackb(header)
        assert unpacked[0] == number and len(unpacked) == 1 + len(fields)
        assert header == msgpack.packb(unpacked), "nothing is hidden in how it is packed"
        assert len(payload) == (type(message) in (wire.Enter, wire.Answer))


@EVERY
def test_what_a_step_says_is_where_its_rows_are(heard, which):
    """Step numbers, positions and wanted rows can be foretold from the lengths of prompt and text alone."""
    one = heard[which]
    expected = [wire.Enter(1, ((1, 0, PROMPT_TOKENS),), (PROMPT_TOKENS - 1,), ())]
    expected += [wire.Enter(1 + i, ((1, PROMPT_TOKENS + i - 1, 1),), (0,), ()) for i in range(1, STEPS)]
    assert [message for message, _ in one.of(wire.Enter)] == expected


def test_headers_and_sizes_of_two_texts_are_the_same(heard):
    """Another prompt of the same length, another text, greedy or sampled: the cloud could not tell by them."""
    one, other = heard["greedy", "f32"], heard["sampled", "f32"]
    assert one.tokens != other.tokens and one.prompt != other.prompt
    sizes = [[[len(frame) for frame in frames] for frames in each.frames] for each in (one, other)]
    assert sizes[0] == sizes[1]
    headers = [[frames[0] for frames in each.frames] for each in (one, other)]
    assert headers[0][1:] == headers[1][1:]
    sessions = {each.messages[0][0].session for each in heard.values()}
    assert len(sessions) == len(heard), "drawn anew for each connection"


@EVERY
def test_payloads_are_rows_and_answers_and_nothing_more(heard, base, pair, which):
    one = heard[which]
    shape = pair[1].shape
    stream = Rows(one.form, base.config.dim)
    embedding = base.f32("embedding")
    ids = one.prompt + one.tokens
    for message, (payload,) in one.of(wire.Enter):
        ((_, first, count),) = message.rows
        assert payload == stream.encode(embedding[ids[first : first + count]]).tobytes()
    answers = {}
    for message, (payload,) in one.of(wire.Answer):
        answers.setdefault(message.step, []).append((message, payload))
    every = [(stop.layer, stop.product) for stop in stops(shape, range(base.config.n_layers))]
    assert sorted(answers) == list(range(1, STEPS + 1))
    for step, found in answers.items():
        assert [(message.layer, message.product) for message, _ in found] == every
        count = PROMPT_TOKENS if step == 1 else 1
        for message, payload in found:
            width = len(targets_of(shape, message.product)) * shape.r_d2c
            rows = Rows(one.form, width)
            assert len(payload) == count * rows.row_bytes
            assert rows.encode(rows.decode(payload, count)).shape == (len(payload),)


def test_the_session_says_nothing_of_m(heard, pair):
    """Its keys are those of the page, and the fingerprint is that of A and B, whatever M is."""
    cloud_half, edge_half = pair
    (((opening, _),),) = (heard["greedy", "f32"].of(wire.Open),)
    session = opening.session
    assert sorted(session) == ["adapter", "context", "form", "layers", "model_digest"]
    assert sorted(session["adapter"]) == ["fingerprint", "layers", "r_c2d", "r_d2c", "seed", "targets"]
    assert session["adapter"]["fingerprint"] == cloud_half.fingerprint
    other = strong_halves(ModelFile(model_path()).config, tuple(TARGETS), ranks=RANKS, m_seed=2)[1]
    assert (other.m(0, "q") != edge_half.m(0, "q")).any() and other.fingerprint == edge_half.fingerprint


def test_with_layers_at_the_edge_no_embedding_is_sent(cloud, pair, base, tmp_path):
    write_adapter(tmp_path, *pair)
    ids = list(range(5, 21))
    with Recorder(cloud.port) as recorder:
        with open_llama(recorder.address, adapter=tmp_path, edge_layers=(1, 1)) as llama:
            tokens = [piece.token_id for piece in llama.generate(ids, 4, SamplerSettings(temperature=0))]
        (stream,) = recorder.streams
    rows = base.f32("embedding")[ids + tokens]
    for name, (raw, value) in as_values(rows).items():
        assert found_in(bytes(stream), raw, value) == 0, name
    layers = {message.layer for message in (wire.decode(frames)[0] for frames in messages(bytes(stream)))
              if type(message) is wire.Answer}  # fmt: skip
    assert layers == {1, 2}
