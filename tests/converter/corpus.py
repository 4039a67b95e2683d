"""Texts that tokenizers differ on, and the tokenizers that record_tokenizers.py made."""

import json
from pathlib import Path

FOLDER = Path(__file__).parent / "tokenizers"
NAMES = ("llama3", "qwen3", "gpt2", "smollm", "llama2", "metaspace_always", "metaspace_first", "metaspace_never")

CORPUS = {
    "prose": "The weights don't fit: they'll be read from the disk, a page at a time. \"It's slow,\" she said; "
    "WE'VE SEEN\n"
    "IT'S NOT. I'd rather have 1,024 small files than one o'clock... wouldn't you?\n\nA new paragraph, and its end.",
    "code": "def f(x: int = 3) -> dict[str, list]:\n\tfor i in range(len(x)):\n        if x[i] != y and not z:\n"
    "            return {'a': 1, \"b\": x**2}  # squared\n\n\n#include <stdio.h>\r\nint main(){return 0;}\r\n",
    "numbers": "1234567890 + 3.14159 = 12 345,67; 2024-01-31T23:59:59Z 0x1F 1e-5 ١٢٣٤ ४५६ ½ Ⅷ ² 1a2b 99bottles",
    "emoji": "🔶👩\u200d🚀 👍🏽 flags 🇨🇭🇯🇵 :-) ❤\ufe0f!🎉🎉",
    "cjk": "世界，你好。日本語のテキスト、カタカナ。 한국어 문장입니다. 混ぜるmixed文字123",
    "scripts": "Übergröße naïve café Zürich Ελληνικά русский текст עברית العربية हिन्दी ไทย Việt",
    "composed": "e\u0301 A\u030a n\u0303 \u212b \ufb01 \uff21 \u1100\u1161\u11a8 q\u0307\u0323",
    "spaces": " one  two   three\t\ttabs \t mixed\u00a0no-break\u3000wide\u2003em\u200bzero \x85next\x1cfs "
    "\n \n\n  \r\n\r \v\f end  ",
    "only spaces": "     ",
    "line ends": "\n\n\n\r\n\r\n\n a\n  b\n\n   c",
    "quotes": "'s 'S 'll 'LL 'Ll ' s ''re 'ſ don''t O'Reilly's 'tis rock'n'roll 'M 'dd 'vector",
    "signs": "<<>>!=//**--__##$$%%^^&&||~~``\\n {{}}[[]]()();;::..,,?? a_b_c __init__ @x #1",
    "controls": "a\x00b\x01\x7f\x1b[0m",
    "special": "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|> <|im_start|>user\nHi"
    "<|im_end|>\n<think>\nso\n</think>\n\n<s>[INST] Hi [/INST] hi </s><s> again<|endoftext|>x<unk>",
    "almost special": "<|im_start| >< |im_end|><|im_<|im_end|><thinking></think<s <s></ s><0x41>",
    "unknown": "\u16a0\u16a1 \U00010348 \U0001f9ff \u0f03",
    "one sign": "\u2581\u2581the library's own sign\u2581for a space",
    "runs": "a" * 40 + " " + "ab" * 20 + " " + "\n" * 9 + "-" * 33 + "0" * 10,
    "empty": "",
}  # fmt: skip


def recorded(name: str) -> tuple[dict, dict[str, list[int]]]:
    """A tokenizer.json, and its library's ids of each text of the corpus."""
    values = json.loads((FOLDER / f"{name}.json").read_text())
    return values["tokenizer"], values["ids"]
