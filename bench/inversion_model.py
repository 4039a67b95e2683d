"""A base model cut before one of its decoder layers, and what travels over the cut: with noise, and rounded."""

import copy

import torch
from torch import nn
from transformers import PreTrainedModel

from dllama.formats import FloatType, dequantize, quantize
from dllama.formats.blocks import BLOCK

BATCH = 16  # texts in one pass


class SplitModel:
    """A base model whose first ``edge_layers`` decoder layers are worked by the edge, the others by the cloud."""

    def __init__(self, base: PreTrainedModel, edge_layers: int):
        self.base = base
        self.edge = _part(base, 0, edge_layers)
        self.cloud = _part(base, edge_layers, base.config.num_hidden_layers)

    @torch.no_grad()
    def states(self, tokens: torch.Tensor) -> torch.Tensor:
        """What would enter the cloud's first layer: int64 [texts, length] -> float32 [texts, length, dim]."""
        return torch.cat([self.edge(part, use_cache=False).last_hidden_state for part in tokens.split(BATCH)])

    @torch.no_grad()
    def perplexity(self, sent: torch.Tensor, tokens: torch.Tensor) -> float:
        """Per token, of all but the first of each text, where the cloud works with these states."""
        total = 0.0
        for part, target in zip(sent.split(BATCH), tokens.split(BATCH), strict=True):
            hidden = self.cloud(inputs_embeds=part, use_cache=False).last_hidden_state[:, :-1]
            total += nn.functional.cross_entropy(self.base.lm_head(hidden).mT, target[:, 1:], reduction="sum")
        return float((total / tokens[:, 1:].numel()).exp())


def _part(base: PreTrainedModel, first: int, last: int) -> nn.Module:
    """The layers from ``first`` to before ``last``, and the final norm behind the model's last."""
    config = copy.deepcopy(base.config)
    config.num_hidden_layers = last - first
    with torch.device("meta"):
        part = type(base.model)(config)
    part.embed_tokens, part.rotary_emb = base.model.embed_tokens, base.model.rotary_emb
    part.layers = base.model.layers[first:last]
    part.norm = base.model.norm if last == base.config.num_hidden_layers else nn.Identity()
    return part.eval()


def transmit(
    states: torch.Tensor, sigma: float | torch.Tensor, form: FloatType, random: torch.Generator
) -> torch.Tensor:
    """States [..., dim] as the cloud gets them.

    sigma: standard deviation of the noise that the edge adds, as a share of each row's root mean square
    """
    size = states.square().mean(-1, keepdim=True).sqrt()
    noisy = states + sigma * size * torch.randn(states.shape, generator=random)
    rows = noisy.flatten(0, -2).numpy()
    return torch.from_numpy(dequantize(quantize(rows, form), form, rows.shape[1])).view(states.shape)


def variance(sent: torch.Tensor, sigma: float) -> torch.Tensor:
    """That of noise and Q80 rounding together, as the receiver can tell it: [..., dim], dim in whole blocks."""
    noise = sent.square().mean(-1, keepdim=True) * sigma**2 / (1 + sigma**2)
    step = sent.unflatten(-1, (-1, BLOCK)).abs().amax(-1) / 127
    return noise + step.square().repeat_interleave(BLOCK, -1) / 12


def query_inputs(base: PreTrainedModel, layer: int, tokens: torch.Tensor) -> torch.Tensor:
    """What a layer's query, key and value products take: float32 [rows, dim]."""
    seen = []
    product = base.model.layers[layer].self_attn.q_proj
    hook = product.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, 1)))
    with torch.no_grad():
        for part in tokens.split(BATCH):
            base.model(part, use_cache=False)
    hook.remove()
    return torch.cat(seen)
