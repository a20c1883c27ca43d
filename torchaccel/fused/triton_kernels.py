"""Triton kernels for channels-last tensors, where PyTorch's own are far from what the memory allows.

A tensor is laid out as [N·H·W, C] with the channels together; a program computes a tile of pixels by channels, so that
what a thread reads is contiguous. They run in Triton's interpreter too (`TRITON_INTERPRET=1`), which the tests use.
"""

# mypy: disable-error-code="no-untyped-def"

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl

from torchaccel.fused.ahead import launch

# Elements of a tile: up to sixteen for each thread, fewer where there would be too few programs to fill a GPU.
_TILE_MOST, _TILE_LEAST, _PROGRAMS = 2048, 256, 264
_UNROLLED = 49  # windows up to 7×7 are written out, so that their loads are under way together
_FEW_PIXELS = 1024  # up to so many the mean takes small programs


@triton.jit
def _activate(value, ACTIVATION: tl.constexpr):
    # NaN stays NaN, as in PyTorch.
    if ACTIVATION == "relu":
        value = tl.maximum(value, 0.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "relu6":
        value = tl.clamp(value, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL)
    elif ACTIVATION == "silu":
        value = value / (1.0 + tl.exp(-value))
    elif ACTIVATION == "hardswish":
        value = value * tl.clamp(value + 3.0, 0.0, 6.0, propagate_nan=tl.PropagateNan.ALL) * (1 / 6)
    elif ACTIVATION == "gelu":
        value = value * 0.5 * (1.0 + tl.erf(value * 0.7071067811865476))
    elif ACTIVATION == "gelu_tanh":
        # (1 + tanh(u)) / 2 is the sigmoid of 2u.
        value = value / (1.0 + tl.exp(-1.5957691216057308 * (value + 0.044715 * value * value * value)))
    return value


@triton.jit
def _max_with(best, x, n, h, w, c, inside, C, H, W):
    valid = inside & (h >= 0) & (h < H) & (w >= 0) & (w < W)
    place = ((n * H + h) * W + w).to(tl.int64) * C + c
    value = tl.load(x + place, mask=valid, other=float("-inf")).to(tl.float32)
    return tl.maximum(best, value, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def _max_pool(
    x, y, pixels, C, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    inside = (p < pixels) & (c < C)
    left, top, n = (p % OW) * SW - PW, ((p // OW) % OH) * SH - PH, p // (OW * OH)
    best = tl.full((BLOCK_P, BLOCK_C), float("-inf"), tl.float32)
    if UNROLL:
        for kh in tl.static_range(KH):
            for kw in tl.static_range(KW):
                best = _max_with(best, x, n, top + kh * DH, left + kw * DW, c, inside, C, H, W)
    else:
        for kh in range(KH):
            for kw in range(KW):
                best = _max_with(best, x, n, top + kh * DH, left + kw * DW, c, inside, C, H, W)
    tl.store(y + p.to(tl.int64) * C + c, best.to(y.dtype.element_ty), mask=inside)


@triton.jit
def _mean_pixels(x, y, C: tl.constexpr, P: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):
    n = tl.program_id(0).to(tl.int64)
    c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)[None, :]
    total = tl.zeros((BLOCK_P, BLOCK_C), tl.float32)
    for start in range(0, P, BLOCK_P):
        p = start + tl.arange(0, BLOCK_P)[:, None]
        total += tl.load(x + (n * P + p) * C + c, mask=(p < P) & (c < C), other=0.0).to(tl.float32)
    mean = tl.sum(total, 0)[None, :] / P
    tl.store(y + n * C + c, mean.to(y.dtype.element_ty), mask=c < C)


@triton.jit
def _pad_channels(
    x, y, pixels, C, H, W, stride_n, stride_c, stride_h, stride_w,
    PADDED: tl.constexpr, BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_P + tl.arange(0, BLOCK_P)[:, None]
    c = tl.arange(0, BLOCK_C)[None, :]
    w, h, n = p % W, (p // W) % H, (p // (W * H)).to(tl.int64)
    place = n * stride_n + c * stride_c + h * stride_h + w * stride_w
    value = tl.load(x + place, mask=(p < pixels) & (c < C), other=0.0)
    tl.store(y + p.to(tl.int64) * PADDED + c, value.to(y.dtype.element_ty), mask=(p < pixels) & (c < PADDED))


def max_pool(
    x: torch.Tensor,
    y: torch.Tensor,
    kernel: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int],
    dilation: tuple[int, int],
) -> torch.Tensor:
    """Max-pooling of `x` into `y`, both channels-last; the shape of `y` says whether sizes were rounded up."""
    (_, channels, height, width), (_, _, out_height, out_width) = x.shape, y.shape
    grid, block = _tiles(y)
    launch(
        _max_pool, grid, x, y, y.numel() // channels, channels, height, width, out_height, out_width,
        *kernel, *stride, *padding, *dilation, *block, UNROLL=kernel[0] * kernel[1] <= _UNROLLED,
    )  # fmt: skip
    return y


def mean_vectors(shape: Sequence[int]) -> tuple[int, ...]:
    """How many times 16 bytes of channels a program of the mean may take, worth timing: more for smaller images.

    Of a large batch the larger number, measured on an H200 for images of 7×7 to 112×112; of a small one its half.
    """
    most = min(8, triton.next_power_of_2(max(1, 56 // math.isqrt(shape[2] * shape[3]))))
    return (most, most // 2) if most > 1 else (1,)


def mean_pixels(x: torch.Tensor, y: torch.Tensor, vectors: int) -> torch.Tensor:
    """The mean over height and width of channels-last `x` [N, C, H, W] into `y`, N·C values.

    A program takes `vectors` times 16 bytes of channels: more read longer runs of memory, fewer make more programs.
    """
    batch, channels, height, width = x.shape
    vector = 16 // x.element_size()
    block_c = min(vectors * vector, triton.next_power_of_2(channels))
    warps = 4 if height * width <= _FEW_PIXELS else 8
    # Eight loads of a thread are under way together.
    block_p = min(8 * 32 * warps * vector // block_c, triton.next_power_of_2(height * width))
    grid = (batch, triton.cdiv(channels, block_c))
    blocks = {"BLOCK_P": block_p, "BLOCK_C": block_c}
    launch(_mean_pixels, grid, x, y, channels, height * width, **blocks, num_warps=warps)
    return y


def pad_channels(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """`x`, of any strides, into channels-last `y`, which has more channels: zeros there."""
    batch, channels, height, width = x.shape
    pixels, padded = batch * height * width, y.shape[1]
    block_p = 512
    _pad_channels[(triton.cdiv(pixels, block_p),)](
        x, y, pixels, channels, height, width, *x.stride(),
        PADDED=padded, BLOCK_P=block_p, BLOCK_C=triton.next_power_of_2(padded),
    )  # fmt: skip
    return y


def _tiles(y: torch.Tensor) -> tuple[tuple[Any, ...], tuple[int, int]]:
    """The grid over pixels and channels of an output, and the tile of one program."""
    channels = y.shape[1]
    pixels = y.numel() // channels
    block_c = min(64, triton.next_power_of_2(channels))
    tile, blocks = _TILE_MOST, triton.cdiv(channels, block_c)
    while tile > _TILE_LEAST and triton.cdiv(pixels * block_c, tile) * blocks < _PROGRAMS:
        tile //= 2
    block_p = tile // block_c
    return (triton.cdiv(pixels, block_p), blocks), (block_p, block_c)
