"""The decoder layers on a device: their weights, the buffers of a batch, and the arithmetic between two products.

A layer has four products, numbered as in `passage`: QKV, OUT, UP and DOWN. ``make_input`` makes a product's input of
what the one before it left, ``multiply`` is the product itself. The residual stream, norms and angles are float32,
products, keys and values of the products' dtype. A mixture of experts is worked as a whole in its UP; its DOWN is
empty.

Rows of q and k are in Hugging Face's order here, whatever the file's: rotary pairs are (i, i + head_dim/2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

from dllama.engine.weights import ATTENTION, FEED_FORWARD, NORMS, Source
from dllama.engine.workspace import MAX_ROWS
from dllama.formats import Activation, ModelConfig, TensorInfo, expert_name
from dllama.formats.rotary import to_checkpoint_order
from dllama.privatelora.backends.torch.pages import Pool
from dllama.privatelora.backends.torch.plan import Plan, Planner
from dllama.privatelora.backends.torch.weights import PACKED, Matrix, Plain, Scratch

QKV, OUT, UP, DOWN = 0, 1, 2, 3


class FeedForward(NamedTuple):
    """Of a layer, or of an expert. up: rows of gate, then of up"""

    up: Matrix
    down: Matrix


@dataclass(frozen=True)
class Layer:
    """head_norm: float32 [query and kv heads, head_dim], None where heads are not normed; router: float32 [experts,
    dim], None where ``ffn`` has one entry."""

    qkv: Matrix
    out: Matrix
    ffn: list[FeedForward]
    router: torch.Tensor | None
    head_norm: torch.Tensor | None
    attention_norm: torch.Tensor
    ffn_norm: torch.Tensor


class Buffers:
    """Values of a batch's rows. They never move, so that what was captured for some rows stays valid.

    x: float32 [MAX_ROWS, dim], the residual stream;  left: what each product left, q, k and v side by side in the
    first, gate and up in the third;  inputs: of each product. A mixture's DOWN has neither, its UP leaves [.., dim].
    """

    def __init__(self, config: ModelConfig, dtype: torch.dtype, device: torch.device):
        def rows(width: int) -> torch.Tensor:
            return torch.zeros(MAX_ROWS, width, dtype=dtype, device=device)

        self.x = torch.zeros(MAX_ROWS, config.dim, device=device)
        y, normed = rows(config.dim), rows(config.dim)
        qkv, heads = rows(config.q_dim + 2 * config.kv_dim), rows(config.q_dim)
        if config.arch.has_experts:
            self.left, self.inputs = (qkv, y, y, y), (normed, heads, normed, normed)
        else:
            self.left = qkv, y, rows(2 * config.hidden_dim), y
            self.inputs = normed, heads, normed, rows(config.hidden_dim)


class Stack:
    """A model's decoder layers. ``packed``: whether quantised matrices stay packed."""

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype,
        packed: bool,
        device: torch.device,
        progress: Callable[[int, int], None],
    ):
        self.config = source.config
        self.buffers = Buffers(self.config, dtype, device)
        self.pool = Pool(self.config, dtype, device)
        self.planner = Planner(self.config, dtype, device)
        self._dtype, self._device = dtype, device
        self._group = self.config.n_heads // self.config.n_kv_heads
        loader = _Loader(source, dtype, packed, device, progress)
        self._layers = [loader.layer(number) for number in range(self.config.n_layers)]

    @staticmethod
    def nbytes(source: Source, dtype: torch.dtype, packed: bool) -> int:
        """Bytes of the layers' weights on the device."""
        kept = packed and source.config.weight_type in PACKED
        # Scales take 4 bytes where products are in float32.
        wider = 2 / 32 if dtype is torch.float32 else 0
        return sum(
            int(info.nbytes + info.rows * info.columns * wider) if kept else info.rows * info.columns * dtype.itemsize
            for info in source.tensors()
            if info.layer is not None
        )

    def make_input(self, plan: Plan, layer: int, product: int) -> None:
        """The input of a product, from what the one before it left."""
        n, buffers, record = plan.n_rows, self.buffers, self._layers[layer]
        target = buffers.inputs[product][:n]
        if product == QKV or product == UP:
            norm = record.attention_norm if product == QKV else record.ffn_norm
            target.copy_(self._norm(self.residual(plan), norm))
        elif product == OUT:
            self._attend(plan, layer, buffers.left[QKV][:n], target)
        elif record.router is None:
            self._activate(buffers.left[UP][:n], target)

    def multiply(self, plan: Plan, layer: int, product: int) -> None:
        """The product."""
        n, record = plan.n_rows, self._layers[layer]
        x, out = self.buffers.inputs[product][:n], self.buffers.left[product][:n]
        if product == QKV:
            record.qkv.product(x, out)
        elif product == OUT:
            record.out.product(x, out)
        elif record.router is not None:
            if product == UP:
                self._mixture(record, x, out)
        elif product == UP:
            record.ffn[0].up.product(x, out)
        else:
            record.ffn[0].down.product(x, out)

    def residual(self, plan: Plan) -> torch.Tensor:
        """x, with what OUT or DOWN left added: once for each of them."""
        return self.buffers.x[: plan.n_rows].add_(self.buffers.left[DOWN][: plan.n_rows])

    def _norm(self, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return F.rms_norm(x, weight.shape, weight, self.config.norm_epsilon)

    def _attend(self, plan: Plan, layer: int, qkv: torch.Tensor, out: torch.Tensor) -> None:
        """Norms of heads, rotary embedding, the new keys and values into the pool, attention of each row."""
        c, n, cache = self.config, plan.n_rows, self.pool.layers[layer]
        heads, values = qkv.split((c.q_dim + c.kv_dim, c.kv_dim), 1)
        heads = heads.float().unflatten(1, (-1, c.head_dim))
        head_norm = self._layers[layer].head_norm
        if head_norm is not None:
            heads = F.rms_norm(heads, (c.head_dim,), None, c.norm_epsilon) * head_norm
        turned = heads * self.planner.cos[:n]
        turned.addcmul_(heads.roll(c.head_dim // 2, -1), self.planner.sin[:n])
        queries, keys = turned.to(self._dtype).split((c.n_heads, c.n_kv_heads), 1)
        new = torch.stack((keys, values.unflatten(1, (-1, c.head_dim))), 1)
        cache.index_copy_(0, self.planner.slots[:n], new)
        for rows, sequences, past, mask in plan.attention:
            # A kv head's queries, of its heads and of all rows of a sequence, attend as one matrix.
            shape = sequences, -1, c.n_kv_heads, self._group, c.head_dim
            grouped = queries[rows].reshape(shape).permute(0, 2, 3, 1, 4)
            known = cache.index_select(0, past).view(sequences, -1, *cache.shape[1:]).permute(2, 0, 3, 1, 4)
            found = F.scaled_dot_product_attention(grouped.flatten(2, 3), known[0], known[1], attn_mask=mask)
            out[rows] = found.view(grouped.shape).permute(0, 3, 1, 2, 4).reshape(-1, c.q_dim)

    def _activate(self, hidden: torch.Tensor, out: torch.Tensor) -> None:
        """out = act(gate)·up"""
        gate, up = hidden.chunk(2, 1)
        act = F.silu(gate) if self.config.activation is Activation.SILU else F.gelu(gate, approximate="tanh")
        torch.mul(act, up, out=out)

    def _mixture(self, layer: Layer, x: torch.Tensor, out: torch.Tensor) -> None:
        """Each row's likeliest experts, mixed by the softmax of their logits. Rows are sorted by expert for this."""
        active = self.config.n_active_experts
        logits, chosen = (x.float() @ layer.router.t()).topk(active, 1)
        order = chosen.flatten().argsort(stable=True)
        counts = torch.bincount(chosen.flatten(), minlength=self.config.n_experts).tolist()
        inputs = x[order // active]
        outputs = torch.empty_like(inputs)
        start = 0
        for expert, count in zip(layer.ffn, counts, strict=True):
            if count:
                rows = slice(start, start + count)
                hidden = x.new_empty(count, 2 * self.config.ffn_dim)
                expert.up.product(inputs[rows], hidden)
                inner = x.new_empty(count, self.config.ffn_dim)
                self._activate(hidden, inner)
                expert.down.product(inner, outputs[rows])
                start += count
        of_row = torch.empty_like(outputs)
        of_row[order] = outputs
        mix = logits.softmax(1)[..., None]
        out.copy_((of_row.view(len(x), active, -1).float() * mix).sum(1))


class _Loader:
    """Makes layers of a source's tensors, and lets go of its pages."""

    def __init__(
        self,
        source: Source,
        dtype: torch.dtype,
        packed: bool,
        device: torch.device,
        progress: Callable[[int, int], None],
    ):
        self._source, self._dtype, self._device, self._progress = source, dtype, device, progress
        self._packed = PACKED.get(source.config.weight_type) if packed else None
        self._scratch = Scratch(dtype, device)
        self._has = {info.name for info in source.tensors()}
        self._total = sum(info.nbytes for info in source.tensors() if info.layer is not None)
        self._done = 0

    def layer(self, number: int) -> Layer:
        config = self._source.config
        q, k, v, out = ATTENTION
        w1, w2, w3 = FEED_FORWARD
        if config.arch.has_experts:
            names = [[expert_name(name, i) for name in FEED_FORWARD] for i in range(config.n_experts)]
        else:
            names = [FEED_FORWARD]
        attention_norm, ffn_norm, q_norm, k_norm = (
            self._vector(name, number) if name in self._has else None for name in NORMS
        )
        head_norm = None
        if q_norm is not None:
            head_norm = torch.stack([q_norm] * config.n_heads + [k_norm] * config.n_kv_heads)
        return Layer(
            qkv=self._matrix(number, q, k, v),
            out=self._matrix(number, out),
            ffn=[FeedForward(self._matrix(number, w1, w3), self._matrix(number, w2)) for w1, w2, w3 in names],
            router=self._vector("router", number) if config.arch.has_experts else None,
            head_norm=head_norm,
            attention_norm=attention_norm,
            ffn_norm=ffn_norm,
        )

    def _matrix(self, layer: int, *names: str) -> Matrix:
        """Matrices of one width, one below the other."""
        infos = [self._source.info(name, layer) for name in names]
        rows, columns = sum(info.rows for info in infos), infos[0].columns
        if self._packed is not None:
            matrix = self._packed(rows, columns, self._scratch, self._device)
        else:
            matrix = Plain(rows, columns, self._dtype, self._device)
        for start, info in zip(_starts(infos), infos, strict=True):
            raw = to_checkpoint_order(self._source.raw(info.name, layer), info.name, self._source.config)
            matrix.fill(start, raw, info.float_type)
            self._loaded(info)
        return matrix

    def _vector(self, name: str, layer: int) -> torch.Tensor:
        """A norm, or a router: float32."""
        values = torch.from_numpy(np.array(self._source.f32(name, layer))).to(self._device)
        self._loaded(self._source.info(name, layer))
        return values

    def _loaded(self, info: TensorInfo) -> None:
        self._source.release(info.name, info.layer)
        self._done += info.nbytes
        self._progress(self._done, self._total)


def _starts(infos: list[TensorInfo]) -> Iterator[int]:
    """The first row of each."""
    start = 0
    for info in infos:
        yield start
        start += info.rows
