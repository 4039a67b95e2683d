"""The tokenizer of a Hugging Face folder: the ids are those of its conversion."""

import pytest

pytest.importorskip("transformers", reason="training needs transformers: pip install '.[train]'")
tokenizers = pytest.importorskip("tokenizers", reason="transformers brings it along")

from converter.tokenizer import convert_tokenizer  # noqa: E402
from dllama.errors import FileError  # noqa: E402
from dllama.tokenizer import load_tokenizer  # noqa: E402
from dllama.train.examples import read_examples  # noqa: E402
from dllama.train.hub_tokenizer import HubTokenizer  # noqa: E402
from tests.tokenizer.models import TEXTS  # noqa: E402

CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A byte-level BPE tokenizer as transformers saves it."""
    from transformers import PreTrainedTokenizerFast

    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    special = ["<|im_start|>", "<|im_end|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special)
    library.train_from_iterator(TEXTS, trainer)
    folder = tmp_path_factory.mktemp("hub")
    saved = PreTrainedTokenizerFast(
        tokenizer_object=library, eos_token="<|im_end|>", additional_special_tokens=["<|im_start|>"]
    )
    saved.chat_template = CHAT
    saved.save_pretrained(folder)
    return folder


def test_ids_are_those_of_the_converted_tokenizer(folder, tmp_path):
    hub = HubTokenizer(folder)
    convert_tokenizer(folder, tmp_path / "a.t")
    ours = load_tokenizer(tmp_path / "a.t")
    assert (hub.vocab_size, hub.eos_ids, hub.chat_template) == (ours.vocab_size, ours.eos_ids, ours.chat_template)
    for text in (*TEXTS, "<|im_start|>spelled out<|im_end|>"):
        for special in (False, True):
            assert hub.encode(text, special=special) == ours.encode(text, special=special), text


def test_messages_are_the_same_examples(folder, tmp_path):
    hub = HubTokenizer(folder)
    convert_tokenizer(folder, tmp_path / "a.t")
    path = tmp_path / "train.jsonl"
    path.write_text('{"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "world"}]}')
    found, expected = (read_examples(path, each, 99)[0][0] for each in (hub, load_tokenizer(tmp_path / "a.t")))
    assert found.ids.tolist() == expected.ids.tolist() and found.learnt.tolist() == expected.learnt.tolist()
    assert found.ids[found.learnt].tolist() == hub.encode("world<|im_end|>\n", special=True)


def test_a_folder_without_one(tmp_path):
    with pytest.raises(FileError, match="holds no tokenizer that can be read"):
        HubTokenizer(tmp_path)
