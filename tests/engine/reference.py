"""The whole model in float64 numpy, written straight from the equations: what every engine result is held against."""

import numpy as np

from dllama.engine.rope import frequencies
from dllama.formats import Activation, ModelFile, RopeType


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


def logits(model: ModelFile, tokens) -> np.ndarray:
    """float64 [tokens, vocab]: causal logits of one sequence."""
    c = model.config

    def matrix(name, layer=None):
        return model.f32(name, layer).astype(np.float64)

    x = matrix("embedding")[tokens]
    n = len(tokens)
    angles = np.outer(np.arange(n), frequencies(c))
    half_split = c.rope_type is RopeType.HALF_SPLIT
    names = {info.name for info in model.tensors()}
    for layer in range(c.n_layers):
        h = rms_norm(x, matrix("attention_norm", layer), c.norm_epsilon)
        q = (h @ matrix("q", layer).T).reshape(n, c.n_heads, c.head_dim)
        k = (h @ matrix("k", layer).T).reshape(n, c.n_kv_heads, c.head_dim)
        v = (h @ matrix("v", layer).T).reshape(n, c.n_kv_heads, c.head_dim)
        if "q_norm" in names:
            q = rms_norm(q, matrix("q_norm", layer), c.norm_epsilon)
            k = rms_norm(k, matrix("k_norm", layer), c.norm_epsilon)
        q, k = turn(q, angles, half_split), turn(k, angles, half_split)
        group = c.n_heads // c.n_kv_heads
        k, v = np.repeat(k, group, 1), np.repeat(v, group, 1)
        scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(c.head_dim)
        scores = np.where(np.tril(np.ones((n, n), bool)), scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        attention = np.einsum("hqk,khd->qhd", weights, v).reshape(n, c.q_dim)
        x = x + attention @ matrix("o", layer).T
        h = rms_norm(x, matrix("ffn_norm", layer), c.norm_epsilon)
        gate, up = h @ matrix("w1", layer).T, h @ matrix("w3", layer).T
        if c.activation is Activation.GELU:
            gate = gate * 0.5 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        else:
            gate = gate / (1 + np.exp(-gate))
        x = x + (gate * up) @ matrix("w2", layer).T
    return rms_norm(x, matrix("final_norm"), c.norm_epsilon) @ matrix("output").T
