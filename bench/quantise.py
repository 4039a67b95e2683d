"""How much closer are Q40 weights with searched scales, and what does the search cost?

    python -m bench.quantise

Squared errors are against the reference quantiser's, for random weights of three distributions and for the embedded
model's output matrix, whose floats are in its file. Speed is that of one thread on rows in memory, in megabytes of F16
weights: two bytes each.
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import asdict

import numpy as np

from bench.report import Figure, print_table, save
from converter.quantise import quantise
from dllama.embedded import model_path
from dllama.formats import FloatType, ModelFile, dequantize

COLUMNS = 4096

Quantiser = Callable[[np.ndarray], np.ndarray]


def weights(rows: int) -> dict[str, np.ndarray]:
    """float32 [rows, columns] of each kind."""
    random = np.random.default_rng(0)
    shape = rows, COLUMNS
    with ModelFile(model_path()) as model:
        embedded = model.f32("embedding").copy()
    return {
        "Gaussian": random.standard_normal(shape, dtype=np.float32),
        "Laplace": random.laplace(size=shape).astype(np.float32),
        "Student t, 4 degrees of freedom": random.standard_t(4, size=shape).astype(np.float32),
        "output matrix of the embedded model": embedded,
    }


def squared_error(raw: np.ndarray, float_type: FloatType, x: np.ndarray) -> float:
    rest = dequantize(raw, float_type, x.shape[1]).astype(np.float64) - x
    return float((rest * rest).sum())


def speed(quantiser: Quantiser, x: np.ndarray, rounds: int) -> Figure:
    """Millions of F16 bytes a second, in time of this thread's CPU, which others' work leaves alone."""
    quantiser(x[:1])  # compiled
    rates = []
    for _ in range(rounds):
        start = time.thread_time()
        quantiser(x)
        rates.append(2 * x.size / (time.thread_time() - start) / 1e6)
    return Figure.of(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help=f"of {COLUMNS} weights, for the speed [%(default)s]")
    parser.add_argument("--rounds", type=int, default=7, help="[%(default)s]")
    options = parser.parse_args()

    importance = np.random.default_rng(1).lognormal(0, 1, COLUMNS).astype(np.float32)
    quantisers: dict[str, Quantiser] = {
        "q40": lambda x: quantise(x, FloatType.Q40),
        "q40, with importances": lambda x: quantise(x, FloatType.Q40, importance=importance),
        "q40, reference": lambda x: quantise(x, FloatType.Q40, reference=True),
        "q80": lambda x: quantise(x, FloatType.Q80),
    }
    x = np.random.default_rng(0).standard_normal((options.rows, COLUMNS), dtype=np.float32)
    speeds = {name: speed(quantiser, x, options.rounds) for name, quantiser in quantisers.items()}

    errors = {}
    for name, x in weights(64).items():
        reference = squared_error(quantise(x, FloatType.Q40, reference=True), FloatType.Q40, x)
        found = squared_error(quantise(x, FloatType.Q40), FloatType.Q40, x)
        errors[name] = found / reference

    print("\nSquared error of Q40, the reference quantiser's being 1\n")
    print_table(("weights", "searched scales"), [(name, f"{ratio:.4f}") for name, ratio in errors.items()])
    print("\nSpeed of one thread, in F16 weights\n")
    print_table(("to", "MB/s"), [(name, figure.text(0)) for name, figure in speeds.items()])
    save(
        "quantise",
        {
            "question": "quantise",
            "error_against_reference": errors,
            "f16_mb_per_s": {name: asdict(figure) for name, figure in speeds.items()},
        },
    )


if __name__ == "__main__":
    main()
