import contextlib
import json

import numpy as np
import pytest
from click.testing import CliRunner

from converter.convert import Settings, convert, silent
from converter.gguf_file import read_gguf
from converter.gguf_model import open_file
from converter.hf_config import linear_scaling
from converter.to_gguf import command, to_gguf
from converter.tokenizer import convert_tokenizer
from dllama.engine.sampler import SamplerSettings
from dllama.errors import FileError, FormatError
from dllama.formats import Activation, FloatType, ModelWriter, RopeType
from dllama.formats.vocabulary import Vocabulary, write_t
from dllama.llama import Llama
from dllama.tokenizer import load_tokenizer
from tests.converter.corpus import CORPUS, NAMES, recorded
from tests.formats.models import LLAMA, LLAMA3_1, QWEN3, QWEN3_MOE, config, write_random
from tests.tokenizer.models import as_t, train

LINEAR = {**LLAMA, "rope_type": RopeType.LLAMA3_1, **linear_scaling(4.0)}
SHAPES = {"llama": LLAMA, "qwen3": QWEN3, "llama3.1": LLAMA3_1, "linear": LINEAR, "qwen3-moe": QWEN3_MOE}
VOCAB = 400


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return as_t(train(tmp_path_factory.mktemp("to_gguf") / "tokenizer.model", vocab_size=VOCAB))


def model(path, shape=LLAMA, weight_type=FloatType.F32, **changes):
    write_random(path, config(shape, weight_type, **{"vocab_size": VOCAB, "head_dim": 32, **changes}), seed=3)
    return path


@pytest.mark.parametrize("weight_type", FloatType)
@pytest.mark.parametrize("shape", SHAPES)
def test_there_and_back_gives_the_same_file(tmp_path, tokenizer, shape, weight_type):
    before = model(tmp_path / "a.m", SHAPES[shape], weight_type)
    to_gguf(before, tokenizer, tmp_path / "a.gguf", silent)
    checkpoint = open_file(tmp_path / "a.gguf", weight_type)
    with ModelWriter(tmp_path / "b.m", checkpoint.config) as writer:
        for info, source in checkpoint.sources:
            writer.write(info.name, info.layer, source.stored(0, info.rows, info.float_type))
    assert (tmp_path / "b.m").read_bytes() == before.read_bytes()


@pytest.mark.parametrize("shape", SHAPES)
def test_the_gguf_package_reads_the_same(tmp_path, tokenizer, shape):
    gguf = pytest.importorskip("gguf")
    to_gguf(model(tmp_path / "a.m", SHAPES[shape], FloatType.Q80), tokenizer, tmp_path / "a.gguf", silent)
    reader = gguf.GGUFReader(tmp_path / "a.gguf")
    metadata, entries = read_gguf(tmp_path / "a.gguf")
    data = (tmp_path / "a.gguf").read_bytes()
    assert [tensor.name for tensor in reader.tensors] == list(entries)
    for tensor in reader.tensors:
        entry = entries[tensor.name]
        assert tensor.data.tobytes() == data[entry.offset : entry.offset + entry.nbytes]
        assert tuple(tensor.shape[::-1]) == entry.shape
    for key, value in metadata.items():
        theirs = reader.fields[key].contents()
        assert theirs == value if not isinstance(value, np.ndarray) else theirs == value.tolist()
    assert len(reader.fields) == len(metadata) + 3  # it counts version and counts as fields


@pytest.mark.parametrize("shape", SHAPES)
def test_llama_cpp_generates_the_same_tokens(tmp_path, tokenizer, shape):
    """F32 weights, likeliest token each time."""
    llama_cpp = pytest.importorskip("llama_cpp")
    path = model(tmp_path / "a.m", SHAPES[shape], seq_len=256)
    to_gguf(path, tokenizer, tmp_path / "a.gguf", silent)
    prompt = [1, 5, 9, 100, 200, 17]
    ours = Llama(path, tokenizer, nthreads=1, buffer_float_type="f32", kv_float_type="f32")
    expected = [piece.token_id for piece in ours.generate(prompt, 30, SamplerSettings(temperature=0))]
    logits = ours.logits(prompt)
    ours.close()
    theirs = llama_cpp.Llama(
        str(tmp_path / "a.gguf"), n_ctx=64, n_threads=1, n_threads_batch=1, logits_all=True, type_k=0, type_v=0,
        verbose=False,
    )  # fmt: skip
    found = theirs.generate(prompt, temp=0, top_k=1)
    assert [next(found) for _ in expected] == expected
    np.testing.assert_allclose(theirs.scores[: len(prompt)], logits, atol=1e-2)


@pytest.mark.filterwarnings("ignore")  # the library's own
@pytest.mark.parametrize("weight_type", [FloatType.F32, FloatType.Q40, FloatType.Q80])
@pytest.mark.parametrize("shape, head_dim", [("llama", 32), ("qwen3", 128)])
def test_transformers_generates_the_same_tokens(tmp_path, tokenizer, shape, head_dim, weight_type):
    """Likeliest token each time. It widens all weights to F32, and takes the usual head_dim whatever a GGUF says."""
    torch, transformers = pytest.importorskip("torch"), pytest.importorskip("transformers")
    pytest.importorskip("gguf")
    path = model(tmp_path / "a.m", SHAPES[shape], weight_type, seq_len=256, dim=4 * 32, n_heads=4, head_dim=head_dim)
    to_gguf(path, tokenizer, tmp_path / "a.gguf", silent)
    try:
        theirs = transformers.AutoModelForCausalLM.from_pretrained(
            str(tmp_path), gguf_file="a.gguf", dtype=torch.float32
        )
    except (ImportError, TypeError, ValueError) as error:
        pytest.skip(f"transformers {transformers.__version__} does not load it: {error}")
    prompt = [1, 5, 9, 100, 200, 17]
    ours = Llama(path, tokenizer, nthreads=1, buffer_float_type="f32", kv_float_type="f32")
    expected = [piece.token_id for piece in ours.generate(prompt, 15, SamplerSettings(temperature=0))]
    logits = ours.logits(prompt)
    ours.close()
    ids = list(prompt)
    with torch.no_grad():
        found = theirs(torch.tensor([prompt])).logits[0].numpy()
        for _ in expected:
            ids.append(int(theirs(torch.tensor([ids])).logits[0, -1].argmax()))
    assert ids[len(prompt) :] == expected
    np.testing.assert_allclose(found, logits, atol=1e-3 * np.abs(logits).max())


@pytest.mark.parametrize("name", ["llama3", "qwen3", "gpt2", "smollm", "llama2"])
def test_llama_cpp_encodes_the_same(tmp_path, name):
    """But for characters that Qwen's tokenizers compose and llama.cpp leaves as they are."""
    llama_cpp = pytest.importorskip("llama_cpp")
    values, ids = recorded(name)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    vocabulary = convert_tokenizer(tmp_path / "tokenizer.json", tmp_path / "a.t")
    path = model(tmp_path / "a.m", vocab_size=len(vocabulary.pieces) + 5)
    to_gguf(path, tmp_path / "a.t", tmp_path / "a.gguf", silent)
    theirs = llama_cpp.Llama(str(tmp_path / "a.gguf"), vocab_only=True, verbose=False)
    tokenizer = load_tokenizer(tmp_path / "a.t")
    different = []
    for key, text in CORPUS.items():
        found = theirs.tokenize(text.encode(), add_bos=False, special=True)
        if found != tokenizer.encode(text, bos=False, special=True):
            different.append(key)
    assert different == (["composed"] if name == "qwen3" else [])


@pytest.mark.parametrize("name", NAMES)
def test_a_tokenizer_there_and_back_encodes_the_same(tmp_path, name):
    values, ids = recorded(name)
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    vocabulary = convert_tokenizer(tmp_path / "tokenizer.json", tmp_path / "a.t")
    to_gguf(model(tmp_path / "a.m", vocab_size=len(vocabulary.pieces)), tmp_path / "a.t", tmp_path / "a.gguf", silent)
    back = convert_tokenizer(tmp_path / "a.gguf", tmp_path / "b.t")
    if not name.startswith("metaspace"):  # GGUF says only whether there is a space before the text
        assert back.pre_tokenizer is vocabulary.pre_tokenizer
        tokenizer = load_tokenizer(tmp_path / "b.t")
        assert {key: tokenizer.encode(text, special=True) for key, text in CORPUS.items()} == ids
    assert (back.bos_id, back.add_bos, back.pieces) == (vocabulary.bos_id, vocabulary.add_bos, vocabulary.pieces)


def test_the_pages_of_a_model_are_let_go_of_and_every_byte_is_reported(tmp_path, tokenizer):
    counted = []

    @contextlib.contextmanager
    def progress(label, total):
        yield counted.append
        assert (label, sum(counted)) == ("Writing a.gguf", total)

    to_gguf(model(tmp_path / "a.m"), tokenizer, tmp_path / "a.gguf", progress)
    assert counted


def test_the_command(tmp_path, tokenizer):
    model(tmp_path / "a.m", weight_type=FloatType.Q40)
    out = tmp_path / "a.gguf"
    arguments = [str(tmp_path / "a.m"), str(tokenizer), "-o", str(out)]
    result = CliRunner().invoke(command, arguments)
    assert result.exit_code == 0
    assert result.stdout == f"{out}: {out.stat().st_size:,} bytes, llama, 2 layers, q40\n"
    result = CliRunner().invoke(command, arguments)
    assert isinstance(result.exception, FileError) and "exists already" in str(result.exception)
    assert CliRunner().invoke(command, [*arguments, "--force"]).exit_code == 0


@pytest.mark.parametrize(
    "shape, changes, reason",
    [
        (LLAMA, {"rope_type": RopeType.HALF_SPLIT}, "a.m: a llama model with half-split rotary pairs"),
        (LLAMA, {"activation": Activation.GELU}, "a.m: activation GELU"),
        (LLAMA, {"vocab_size": 399}, "tokenizer.t: 400 tokens, and the model has 399"),
    ],
)
def test_models_refused_with_the_reason(tmp_path, tokenizer, shape, changes, reason):
    path = model(tmp_path / "a.m", shape, **changes)
    with pytest.raises(FormatError, match=reason):
        to_gguf(path, tokenizer, tmp_path / "a.gguf", silent)
    assert not (tmp_path / "a.gguf").exists()


def test_a_byte_level_tokenizer_of_no_known_family_is_refused(tmp_path):
    pieces = [bytes([byte]) for byte in reversed(range(256))]
    write_t(tmp_path / "a.t", Vocabulary([*pieces, b"ab", b"<s>"], [0.0] * 258, bos_id=257, eos_ids=()))
    with pytest.raises(FormatError, match="a.t: the tokenizer's family is not known"):
        to_gguf(model(tmp_path / "a.m"), tmp_path / "a.t", tmp_path / "a.gguf", silent)


@pytest.mark.parametrize("weight_type", FloatType)
def test_converting_back_copies_the_blocks(tmp_path, tokenizer, weight_type):
    before = model(tmp_path / "a.m", weight_type=weight_type)
    to_gguf(before, tokenizer, tmp_path / "a.gguf", silent)
    result = convert(tmp_path / "a.gguf", tmp_path / "b.m", Settings(weight_type))
    assert result.kind == "GGUF file"
    assert (tmp_path / "b.m").read_bytes() == before.read_bytes()
