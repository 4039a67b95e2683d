"""Records what Hugging Face transformers computes for the checkpoints of checkpoints.py.

    pip install '.[train]' && python -m tests.engine.record_transformers

test_transformers.py compares with it where transformers is not installed.
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.engine.checkpoints import CONFIGS, RECORDED, build, logits_by_transformers, tokens


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        logits = {name: logits_by_transformers(build(name, Path(scratch, name)), tokens(name)) for name in CONFIGS}
    versions = f"transformers {transformers.__version__}, torch {torch.__version__}"
    np.savez_compressed(RECORDED, versions=np.array(versions), **logits)
    print(f"{RECORDED}: {RECORDED.stat().st_size} bytes, {versions}")


if __name__ == "__main__":
    main()
