"""A network's first convolution in Triton: three channels padded to four, a stride of two, channels-last.

A row of a window is one run of memory, which cuDNN's kernels read pixel by pixel. Here it is read 16 bytes, two pixels,
at a time: windows begin at even pixels, one to the left of their own where the padding is odd, with a weight of zero
there. So a tile of outputs is a matrix product with a row of the window as its depth, in float32.
"""

# mypy: disable-error-code="no-untyped-def"

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from torchaccel.fused.ahead import launch
from torchaccel.fused.geometry import Geometry
from torchaccel.fused.tensors import aligned
from torchaccel.fused.triton_kernels import _activate

DTYPES = (torch.float16, torch.bfloat16)
CHANNELS = 4


class Tile(NamedTuple):
    """How many outputs a program computes, with how many warps, and how many rows of the window are under way."""

    outputs: int
    warps: int
    stages: int

    def __str__(self) -> str:
        return f"{self.outputs} {self.warps} {self.stages}"


# The best on an H200 for ResNet's first layer at batches 1, 32 and 128.
TILES = (Tile(128, 4, 1), Tile(128, 4, 3), Tile(256, 8, 1))
_WIDEST = 16  # of windows: the depth of a step is four times that


@triton.jit
def _stem(
    x, weight, bias, y, outputs, H, W, OH, OW,
    KH: tl.constexpr, KW: tl.constexpr, PH: tl.constexpr, PW: tl.constexpr, C: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    p = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    c = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    tap = k - PW % 2 * 4
    top, left = (p // OW) % OH * 2 - PH, p % OW - (PW + 1) // 2  # in rows, and in pairs of pixels
    pair = left[:, None] + (k // 8)[None, :]
    across = (p < outputs)[:, None] & (pair >= 0) & (pair < W // 2)
    image = x + (p // (OW * OH)).to(tl.int64) * H * W * 4
    used = ((tap >= 0) & (tap < KW * 4))[:, None] & (c < C)[None, :]
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(KH):
        h = (top + row)[:, None]
        place = h * W * 4 + pair * 8 + (k % 8)[None, :]
        window = tl.load(image[:, None] + place, mask=across & (h >= 0) & (h < H), other=0.0)
        taps = tl.load(weight + (c * (KH * KW * 4))[None, :] + (row * KW * 4 + tap)[:, None], mask=used, other=0.0)
        total = tl.dot(window, taps, total)
    if BIAS:
        total += tl.load(bias + c, mask=c < C, other=0.0).to(tl.float32)[None, :]
    value = _activate(total, ACTIVATION).to(y.dtype.element_ty)
    tl.store(y + p.to(tl.int64)[:, None] * C + c[None, :], value, mask=(p < outputs)[:, None] & (c < C)[None, :])


def stem(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    y: torch.Tensor,
    geometry: Geometry,
    activation: str,
    tile: Tile,
) -> torch.Tensor:
    """activation(conv2d(x, weight) + bias) into `y`, all channels-last and of one dtype, for what `takes` allows."""
    x, weight, (_, _, height, width) = aligned(x), aligned(weight), x.shape
    channels, _, *window = weight.shape
    (_, _, out_height, out_width), outputs = y.shape, y.numel() // channels
    block_n = min(128, max(16, triton.next_power_of_2(channels)))
    block_k = max(16, triton.next_power_of_2(CHANNELS * (window[1] + geometry.padding[1] % 2)))
    launch(
        _stem, (triton.cdiv(outputs, tile.outputs), triton.cdiv(channels, block_n)),
        x, weight, bias, y, outputs, height, width, out_height, out_width, *window, *geometry.padding, channels,
        BIAS=bias is not None, ACTIVATION=activation,
        BLOCK_M=tile.outputs, BLOCK_N=block_n, BLOCK_K=block_k, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return y


def takes(x: torch.Tensor, weight: torch.Tensor, geometry: Geometry) -> bool:
    """Whether the kernel computes such a convolution: four channels of 16 bits, a stride of two, an even width.

    >>> x, weight = (torch.empty(shape, dtype=torch.float16) for shape in ((1, 4, 224, 224), (64, 4, 7, 7)))
    >>> takes(x, weight, Geometry(stride=(2, 2), padding=(3, 3))), takes(x, weight, Geometry())
    (True, False)
    """
    batch, channels, height, width = x.shape
    strided = geometry.stride == (2, 2) and geometry.dilation == (1, 1) and geometry.groups == 1
    shaped = channels == CHANNELS and width % 2 == 0 and 0 < batch * height * width < 2**30
    return strided and shaped and weight.shape[3] < _WIDEST and x.dtype in DTYPES
