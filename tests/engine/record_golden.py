"""Records what the tests know of the embedded model, once that model has changed.

    python -m tests.engine.record_golden --hf FOLDER

FOLDER is the Hugging Face checkpoint that the embedded model was converted from. Writes tests/golden/embedded.json,
which test_golden.py and tests/arm/run compare with.
"""

import argparse
import json
import tempfile
from pathlib import Path

from converter.convert import Settings, convert
from dllama.formats import FloatType
from tests.engine.golden import EXACT, GOLDEN, PROMPT, STEPS, generate, perplexity


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hf", type=Path, required=True, metavar="FOLDER", help="with its tokenizer.model")
    folder = parser.parse_args().hf
    golden = {"prompt": PROMPT, "steps": STEPS, **generate(PROMPT, STEPS)}
    with tempfile.TemporaryDirectory() as scratch:
        model = Path(scratch, "f32.m")
        convert(folder, model, Settings(FloatType.F32))
        golden["f32_perplexity"] = perplexity(model, folder / "tokenizer.model", **EXACT)
    GOLDEN.write_text(json.dumps(golden, ensure_ascii=False) + "\n", encoding="utf-8")
    print(f"{GOLDEN}:\n{PROMPT}{golden['text']}\nperplexity in F32 {golden['f32_perplexity']:.4f}")


if __name__ == "__main__":
    main()
