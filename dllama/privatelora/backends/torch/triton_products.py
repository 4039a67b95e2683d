"""Products with packed matrices on a GPU, in Triton: a matrix is read as it is packed, and nothing unpacked is written.

A few rows are multiplied in float32 by the integers, a block at a time, and each block's sum by its scale. That is
bound by the unpacking, which they share. More rows go through the tensor cores, with values unpacked to the products'
dtype.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from dllama.formats.blocks import BLOCK

FEW = 4
"""Rows up to which they are multiplied one by one."""
TALL = 8192
"""Rows of a matrix from which its tiles may be larger and all multiprocessors still have some."""


def product(x: torch.Tensor, integers: torch.Tensor, scales: torch.Tensor, out: torch.Tensor) -> None:
    """out = x·matrixᵀ;  x: [n, columns], out: [n, rows], float16 or bfloat16, contiguous;  integers, scales: as of
    `Packed`"""
    (n, _), (rows, blocks, nbytes) = x.shape, integers.shape
    given = x, integers, scales, out, n, rows, blocks, nbytes == BLOCK // 2
    wide = triton.next_power_of_2(n)
    if n <= FEW:
        tile, width = 4, 64
        _few[(triton.cdiv(rows, tile),)](*given, wide, tile, width, num_warps=4)
    else:
        wide = max(16, wide)
        tile, width = (64, 4) if rows > TALL else (32, 8)
        _many[(triton.cdiv(rows, tile), triton.cdiv(n, wide))](*given, wide, tile, width, num_warps=4)


@triton.jit
def _few(
    x, integers, scales, out, n, rows, blocks: tl.constexpr, nibbles: tl.constexpr,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the matrix with up to N of x, BLOCKS blocks at a time. Halves of a block, 16 values each, are the
    low and the high nibbles, or the first and the last bytes."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    block, i = tl.arange(0, BLOCKS), tl.arange(0, 16)
    sums = (tl.zeros((ROWS, BLOCKS), tl.float32),) * N
    for first in range(0, blocks, BLOCKS):
        here = first + block
        known = here < blocks
        inside = (row < rows)[:, None] & known[None, :]
        at = row[:, None].to(tl.int64) * blocks + here[None, :]
        if nibbles:
            q = tl.load(integers + at[:, :, None] * 16 + i[None, None, :], mask=inside[:, :, None], other=0)
            low, high = ((q << 4) >> 4).to(tl.float32), (q >> 4).to(tl.float32)
        else:
            place = integers + at[:, :, None] * 32 + i[None, None, :]
            low = tl.load(place, mask=inside[:, :, None], other=0).to(tl.float32)
            high = tl.load(place + 16, mask=inside[:, :, None], other=0).to(tl.float32)
        scale = tl.load(scales + at, mask=inside, other=0).to(tl.float32)
        values = x + here[:, None] * 32 + i[None, :]
        more = ()
        for k in tl.static_range(N):
            given = known[:, None] & (k < n)
            x_low = tl.load(values + k * blocks * 32, mask=given, other=0).to(tl.float32)
            x_high = tl.load(values + k * blocks * 32 + 16, mask=given, other=0).to(tl.float32)
            more = more + (sums[k] + scale * tl.sum(low * x_low[None] + high * x_high[None], 2),)
        sums = more
    for k in tl.static_range(N):
        found = tl.sum(sums[k], 1).to(out.dtype.element_ty)
        tl.store(out + k * rows + row, found, mask=(row < rows) & (k < n))


@triton.jit
def _many(
    x, integers, scales, out, n, rows, blocks: tl.constexpr, nibbles: tl.constexpr,
    N: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """ROWS rows of the matrix with N of x, the halves of BLOCKS blocks at a time."""
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    which = tl.program_id(1) * N + tl.arange(0, N)
    k = tl.arange(0, BLOCKS * 16)
    block, i = k // 16, k % 16
    sums = tl.zeros((ROWS, N), tl.float32)
    for first in range(0, blocks, BLOCKS):
        here = first + block
        inside = (row < rows)[:, None] & (here < blocks)[None, :]
        at = row[:, None].to(tl.int64) * blocks + here[None, :]
        if nibbles:
            q = tl.load(integers + at * 16 + i[None, :], mask=inside, other=0)
            low, high = (q << 4) >> 4, q >> 4
        else:
            low = tl.load(integers + at * 32 + i[None, :], mask=inside, other=0)
            high = tl.load(integers + at * 32 + 16 + i[None, :], mask=inside, other=0)
        scale = tl.load(scales + at, mask=inside, other=0)
        values = x + which[None, :] * blocks * 32 + (here * 32 + i)[:, None]
        given = (which < n)[None, :] & (here < blocks)[:, None]
        x_low, x_high = tl.load(values, mask=given, other=0), tl.load(values + 16, mask=given, other=0)
        sums = tl.dot((low.to(scale.dtype) * scale).to(x_low.dtype), x_low, sums)
        sums = tl.dot((high.to(scale.dtype) * scale).to(x_high.dtype), x_high, sums)
    place = out + which[None, :] * rows + row[:, None]
    tl.store(place, sums.to(out.dtype.element_ty), mask=(row < rows)[:, None] & (which < n)[None, :])
