"""A Triton kernel for linear layers whose activation costs as much as their product: both in one kernel, for Hopper.

A program computes tiles [rows, columns] of the output one after the other. It reads and writes through tensor
descriptors, that is by the GPU's copy engine (TMA). It runs in Triton's interpreter too (`TRITON_INTERPRET=1`).
"""

# mypy: disable-error-code="no-untyped-def"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from triton.tools.tensor_descriptor import TensorDescriptor

from torchaccel.fused.ahead import launch
from torchaccel.fused.tensors import aligned
from torchaccel.fused.triton_kernels import _activate

DTYPES = (torch.float16, torch.bfloat16)
ACTIVATIONS = ("gelu", "gelu_tanh", "silu", "hardswish")


@dataclass(frozen=True)
class Tiles:
    """How the work is cut: the tile of a step, how many steps are under way, and who loads for whom."""

    rows: int
    columns: int
    depth: int
    stages: int
    warps: int
    specialized: bool

    @property
    def name(self) -> str:
        """What `choose` knows it by."""
        return f"triton {self.rows}x{self.columns}x{self.depth}" + (" specialized" if self.specialized else "")


# The best on an H200 over the layers of ViT-B/16 and ConvNeXt-T, out of eighteen.
TILES = (
    Tiles(128, 128, 64, 4, 8, False),
    Tiles(128, 128, 64, 4, 8, True),
    Tiles(64, 256, 64, 4, 4, True),
)


@triton.jit
def _gelu_of_half(value):
    """GELU with an error function good to 3e-7 (Abramowitz and Stegun 7.1.28), for what is rounded to half after it.

    The exact one takes longer than the product that it follows.
    """
    z = tl.abs(value) * 0.7071067811865476
    p = 0.0000430638 * z + 0.0002765672
    p = p * z + 0.0001520143
    p = p * z + 0.0092705272
    p = p * z + 0.0422820123
    p = p * z + 0.0705230784
    p = p * z + 1.0
    p *= p
    p *= p
    p *= p
    p *= p
    tail = 0.5 / p
    return value * tl.where(value >= 0, 1.0 - tail, tail)


@triton.jit
def _linear(
    x, weight, bias, y, rows, columns, depth,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    BIAS: tl.constexpr, ACTIVATION: tl.constexpr, PROGRAMS: tl.constexpr, SPECIALIZED: tl.constexpr,
):  # fmt: skip
    GROUP: tl.constexpr = 8  # tiles of rows that share their columns in the cache
    tiles_m, tiles_n = tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N)
    for tile in tl.range(tl.program_id(0), tiles_m * tiles_n, PROGRAMS, flatten=True, warp_specialize=SPECIALIZED):
        first = tile // (GROUP * tiles_n) * GROUP
        height = min(tiles_m - first, GROUP)
        m = (first + tile % (GROUP * tiles_n) % height) * BLOCK_M
        n = tile % (GROUP * tiles_n) // height * BLOCK_N
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, tl.cdiv(depth, BLOCK_K)):
            total = tl.dot(x.load([m, k * BLOCK_K]), weight.load([n, k * BLOCK_K]).T, total)
        if BIAS:
            place = n + tl.arange(0, BLOCK_N)
            total += tl.load(bias + place, mask=place < columns, other=0.0).to(tl.float32)[None, :]
        total = _gelu_of_half(total) if ACTIVATION == "gelu" else _activate(total, ACTIVATION)
        y.store([m, n], total.to(y.dtype))


def linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, y: torch.Tensor, activation: str, tiles: Tiles
) -> torch.Tensor:
    """activation(x · weightᵀ + bias) into `y`, all contiguous and of one dtype; rows of a multiple of 16 bytes."""
    x, weight, (rows, depth), columns = aligned(x), aligned(weight), x.shape, weight.shape[0]
    count = triton.cdiv(rows, tiles.rows) * triton.cdiv(columns, tiles.columns)
    programs = min(count, _processors(x.device))
    launch(
        _linear, (programs,),
        TensorDescriptor.from_tensor(x, [tiles.rows, tiles.depth]),
        TensorDescriptor.from_tensor(weight, [tiles.columns, tiles.depth]),
        bias,
        TensorDescriptor.from_tensor(y, [tiles.rows, tiles.columns]),
        rows, columns, depth, tiles.rows, tiles.columns, tiles.depth,
        BIAS=bias is not None, ACTIVATION=activation, PROGRAMS=programs, SPECIALIZED=tiles.specialized,
        num_stages=tiles.stages, num_warps=tiles.warps,
    )  # fmt: skip
    return y


def _processors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4


def takes(x: torch.Tensor, weight: torch.Tensor, activation: str) -> bool:
    """Whether the kernel can compute such a layer on this GPU, and has something to gain."""
    if x.dtype not in DTYPES or activation not in ACTIVATIONS or torch.cuda.get_device_capability(x.device) < (9, 0):
        return False
    return x.shape[1] % 8 == 0 and weight.shape[0] % 8 == 0 and x.numel() > 0
