"""A tiny model of random weights and its tokenizer, as transformers has them and converted, and a few problems."""

import json
from pathlib import Path

from converter.convert import Settings, convert
from converter.tokenizer import convert_tokenizer
from dllama.formats import FloatType
from tests.tokenizer.models import TEXTS

CONTEXT = 96
CHAT = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
CHAT += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
PROBLEMS = [
    {"question": "Ann has 2 pears and buys 3. How many pears has she?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
    {"question": "A box holds 4 rows of 6 eggs. How many eggs?", "answer": "4 * 6 = <<4*6=24>>24\n#### 24"},
    {"question": "Bo reads 10 pages a day. How many in 3 days?", "answer": "10 * 3 = <<10*3=30>>30\n#### 30"},
]


def build(folder: Path) -> Path:
    """Writes the folder of a checkpoint, and into it ``model.m`` with weights in F32 and ``tokenizer.t``."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = _tokenizer()
    tokenizer.save_pretrained(folder)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=CONTEXT,
        initializer_range=0.2,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
    )
    torch.set_num_threads(1)  # more of them cost more than they bring in a model so small
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(folder)
    convert(folder, folder / "model.m", Settings(FloatType.F32))
    convert_tokenizer(folder, folder / "tokenizer.t")
    return folder


def write_problems(path: Path) -> Path:
    path.write_text("".join(json.dumps(problem) + "\n" for problem in PROBLEMS))
    return path


def _tokenizer():
    """Byte-level BPE with a chat template and an end-of-text token, but no bos."""
    import tokenizers
    from transformers import PreTrainedTokenizerFast

    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=400,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        special_tokens=["<|im_start|>", "<|im_end|>"],
    )
    library.train_from_iterator(TEXTS, trainer)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=library,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        additional_special_tokens=["<|im_start|>"],
    )
    tokenizer.chat_template = CHAT
    return tokenizer
