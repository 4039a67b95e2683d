"""What a token must read, by hand."""

import pytest

from bench.decode import token_bytes
from bench.synth import SHAPES


@pytest.mark.parametrize(
    ("shape", "weights", "cache"),
    [
        # a layer: 18 bytes for 32 values of the matrices, 4 for each value of the two norms; the same for the output
        (
            "tinyllama-1.1b",
            22 * ((2 * 2048 + 2 * 256 + 3 * 5632) * 64 * 18 + 8 * 2048) + 4 * 2048 + 32000 * 64 * 18,
            22,
        ),
        ("llama2-7b", 32 * ((4 * 4096 + 3 * 11008) * 128 * 18 + 8 * 4096) + 4 * 4096 + 32000 * 128 * 18, 512),
    ],
)
def test_a_token_reads_all_but_the_embedding_and_its_context(shape, weights, cache):
    """cache: KiB a position"""
    assert token_bytes(SHAPES[shape], 0) == weights
    assert token_bytes(SHAPES[shape], 1500) == weights + 1500 * cache * 1024
