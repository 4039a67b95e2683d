"""The whole model in float64 numpy, written straight from the equations: what every engine result is held against."""

from collections.abc import Callable, Sequence

import numpy as np

from dllama.engine.rope import frequencies
from dllama.formats import Activation, FloatType, ModelFile, RopeType, dequantize, quantize


def exact(x: np.ndarray) -> np.ndarray:
    """No rounding."""
    return x


def q80(x: np.ndarray) -> np.ndarray:
    """The last axis of x rounded to blocks of 32 int8 with a float32 scale, as the inputs of products are."""
    blocks = _padded(x).reshape(-1, 32)
    scales = abs(blocks).max(-1, keepdims=True) / 127
    rounded = np.rint(blocks / np.where(scales == 0, 1, scales)) * scales
    return rounded.reshape(*x.shape[:-1], -1)[..., : x.shape[-1]]


def f16(x: np.ndarray) -> np.ndarray:
    """x in half precision, as an F16 cache keeps it."""
    return x.astype(np.float16).astype(np.float64)


def q80_file(x: np.ndarray) -> np.ndarray:
    """The last axis of x in the Q80 blocks of the file format, as a Q80 cache keeps it."""
    padded = _padded(x)
    rows = padded.reshape(-1, padded.shape[-1])
    stored = dequantize(quantize(rows, FloatType.Q80), FloatType.Q80, rows.shape[1])
    return stored.astype(np.float64).reshape(padded.shape)[..., : x.shape[-1]]


def _padded(x):
    return np.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, -x.shape[-1] % 32)])


def rms_norm(x, weight, epsilon):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + epsilon) * weight


def turn(x, angles, half_split):
    """Rotary embedding of x [tokens, heads, head_dim] by angles [tokens, head_dim / 2]."""
    out = np.empty_like(x)
    cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
    half = x.shape[-1] // 2
    first, second = (slice(0, half), slice(half, None)) if half_split else (slice(0, None, 2), slice(1, None, 2))
    a, b = x[..., first], x[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, a * sin + b * cos
    return out


def logits(
    model: ModelFile,
    tokens: Sequence[int],
    act: Callable[[np.ndarray], np.ndarray] = exact,
    cache: Callable[[np.ndarray], np.ndarray] = exact,
    see: Callable[[str, int | None, np.ndarray], None] = lambda name, layer, x: None,
) -> np.ndarray:
    """float64 [tokens, vocab]: causal logits of one sequence.

    act: rounds the inputs of products;  cache: rounds keys and values, head by head;  see: is told what each matrix is
    multiplied with
    """
    c = model.config

    def matrix(name, layer=None):
        return model.f32(name, layer).astype(np.float64)

    def product(x, name, layer=None):
        see(name, layer, x)
        return act(x) @ matrix(name, layer).T

    def feed_forward(h, layer, expert=""):
        gate, up = product(h, "w1" + expert, layer), product(h, "w3" + expert, layer)
        if c.activation is Activation.GELU:
            gate = gate * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        return product(gate * up, "w2" + expert, layer)

    def mixture(h, layer):
        scores = h @ matrix("router", layer).T
        out = np.zeros_like(h)
        for row, chosen in enumerate(np.argsort(-scores, axis=-1)[:, : c.n_active_experts]):
            weights = np.exp(scores[row, chosen])
            for expert, weight in zip(chosen, weights / weights.sum(), strict=True):
                out[row] += weight * feed_forward(h[row], layer, f".{expert}")
        return out

    x = matrix("embedding")[tokens]
    n = len(tokens)
    angles = np.outer(np.arange(n), frequencies(c))
    half_split = c.rope_type is RopeType.HALF_SPLIT
    names = {info.name for info in model.tensors()}
    for layer in range(c.n_layers):
        h = rms_norm(x, matrix("attention_norm", layer), c.norm_epsilon)
        q = product(h, "q", layer).reshape(n, c.n_heads, c.head_dim)
        k = product(h, "k", layer).reshape(n, c.n_kv_heads, c.head_dim)
        v = product(h, "v", layer).reshape(n, c.n_kv_heads, c.head_dim)
        if "q_norm" in names:
            q = rms_norm(q, matrix("q_norm", layer), c.norm_epsilon)
            k = rms_norm(k, matrix("k_norm", layer), c.norm_epsilon)
        q, k = turn(q, angles, half_split), turn(k, angles, half_split)
        k, v = cache(k), cache(v)
        group = c.n_heads // c.n_kv_heads
        k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(c.head_dim)
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attention = np.einsum("hqk,khd->qhd", weights, v).reshape(n, c.q_dim)
        x = x + product(attention, "o", layer)
        h = rms_norm(x, matrix("ffn_norm", layer), c.norm_epsilon)
        if c.arch.has_experts:
            x = x + mixture(h, layer)
        else:
            x = x + feed_forward(h, layer)
    return product(rms_norm(x, matrix("final_norm"), c.norm_epsilon), "output")
