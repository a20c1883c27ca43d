"""Depthwise convolution of channels-last tensors in Triton: a thread has some neighbouring outputs of some channels.

It reads up to 16 bytes of channels at once, whatever their number, and each column of its input once for all outputs
that it belongs to. Sizes are constants of the compiled kernel: only what may lie outside of the input needs a mask, and
a place is one pointer and a constant. Which tile is best is a matter of timing: `tiles` lists some.
"""

# mypy: disable-error-code="no-untyped-def,assignment,var-annotated"
# ruff: noqa: RUF005 - Triton's tuples cannot be unpacked

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from torchaccel.fused.ahead import launch
from torchaccel.fused.geometry import Geometry
from torchaccel.fused.triton_kernels import _activate

_WIDEST = 32  # columns of a window: they are written out, and the compiler's time goes with them
_UNROLLED = 9  # windows up to 3×3 are written out whole, of larger ones a row: they take the compiler seconds
_BLOCKS = 25  # windows up to 5×5 are written out whole for tiles of several rows, which gain the most
_ENOUGH = 132 * 128  # threads that keep a large GPU busy: those of a program on each of its multiprocessors
_WASTED = 1.25  # outputs computed for each that there is, at most: tiles reach beyond the border
_COUNTED = 2**31 - 2**10  # threads that 32 bits number, those behind the last tile among them
# Rows and columns, large tiles first: the best on an H200 over the layers of MobileNetV3-L and ConvNeXt-T, then their
# like for fewer threads. Half of 16 bytes of channels was the best throughout.
_FOR_SMALL = (4, 4), (2, 4), (1, 7), (1, 4), (1, 2), (1, 1)
_FOR_LARGE = (1, 14), (1, 7), (1, 4), (1, 2), (1, 1)
_TIMED = 3  # of these for a problem
_WARPS = 4


class Tile(NamedTuple):
    """What a thread computes."""

    rows: int
    columns: int
    channels: int

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns}x{self.channels}"


def tiles(shape: Sequence[int], dtype: torch.dtype, kernel: tuple[int, int]) -> list[Tile]:
    """The tiles worth timing for an output's shape and a window, large ones first; none for too wide windows.

    They begin with the largest that leaves enough threads for a GPU.
    """
    batch, channels, height, width = shape
    outputs = math.prod(shape)
    if kernel[1] > _WIDEST or not outputs:
        return []
    part = max(1, math.gcd(channels, 16 // dtype.itemsize) // 2)
    found, threads = [], []
    for rows, columns in _FOR_SMALL if kernel[0] * kernel[1] <= _BLOCKS else _FOR_LARGE:
        count = batch * triton.cdiv(height, rows) * triton.cdiv(width, columns) * (channels // part)
        if count * rows * columns * part <= _WASTED * outputs and count < _COUNTED:
            found.append(Tile(rows, columns, part))
            threads.append(count)
    first = sum(count < _ENOUGH for count in threads)
    first = max(0, min(first, len(found) - _TIMED))
    return found[first : first + _TIMED]


@triton.constexpr_function
def _tap(place, output, stride, dilation, size):
    """Which of a window's rows (or columns) meets an input's, for the output of that number; -1 for none."""
    offset = place - output * stride
    return offset // dilation if offset % dilation == 0 and 0 <= offset < size * dilation else -1


@triton.constexpr_function
def _factor(row, column, output, columns, KH, KW, SH, SW, DH, DW):
    """Which of the window's factors joins an input and an output of the tile; negative for none."""
    kh, kw = _tap(row, output // columns, SH, DH, KH), _tap(column, output % columns, SW, DW, KW)
    return -1 if min(kh, kw) < 0 else kh * KW + kw


@triton.constexpr_function
def _used(place, outputs, stride, dilation, size):
    return any(_tap(place, output, stride, dilation, size) >= 0 for output in range(outputs))


@triton.jit
def _load_inside(source, valid, MASKED: tl.constexpr):
    value = tl.load(source, mask=valid, other=0.0) if MASKED else tl.load(source)
    return value.to(tl.float32)


@triton.jit
def _load_factors(factors, weight, WEIGHT_W: tl.constexpr, KW: tl.constexpr):
    for kw in tl.static_range(KW):
        factors = factors + (tl.load(weight + kw * WEIGHT_W).to(tl.float32),)
    return factors


@triton.jit
def _add_row(
    totals, factors, source, valid_row, left, MASKED: tl.constexpr, ROW: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, C: tl.constexpr, W: tl.constexpr, OW: tl.constexpr, KH: tl.constexpr, KW: tl.constexpr,
    SH: tl.constexpr, SW: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
):  # fmt: skip
    """The totals with what one row of the input adds to each: those of a thread's outputs, row by row."""
    LAST_LEFT: tl.constexpr = ((OW - 1) // COLUMNS) * COLUMNS * SW - PW
    for column in tl.static_range((COLUMNS - 1) * SW + (KW - 1) * DW + 1):
        if _used(column, COLUMNS, SW, DW, KW):
            valid = valid_row
            if column < PW:
                valid = valid & (left + column >= 0)
            if LAST_LEFT + column >= W:
                valid = valid & (left + column < W)
            value = _load_inside(source + column * C, valid, MASKED or column < PW or LAST_LEFT + column >= W)
            added = ()
            for output in tl.static_range(ROWS * COLUMNS):
                if _factor(ROW, column, output, COLUMNS, KH, KW, SH, SW, DH, DW) >= 0:
                    factor = factors[_factor(ROW, column, output, COLUMNS, KH, KW, SH, SW, DH, DW)]
                    added = added + (totals[output] + value * factor,)
                else:
                    added = added + (totals[output],)
            totals = added
    return totals


@triton.jit(do_not_specialize=["tiles"])  # one kernel for every batch
def _depthwise(
    x, weight, bias, residual, y, tiles, WEIGHT_C: tl.constexpr, WEIGHT_H: tl.constexpr, WEIGHT_W: tl.constexpr,
    C: tl.constexpr, H: tl.constexpr, W: tl.constexpr, OH: tl.constexpr, OW: tl.constexpr,
    KH: tl.constexpr, KW: tl.constexpr, SH: tl.constexpr, SW: tl.constexpr,
    PH: tl.constexpr, PW: tl.constexpr, DH: tl.constexpr, DW: tl.constexpr,
    BIAS: tl.constexpr, RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, CHANNELS: tl.constexpr, GROUPS: tl.constexpr, THREADS: tl.constexpr,
    UNROLL: tl.constexpr,
):  # fmt: skip
    DOWN: tl.constexpr = (OH + ROWS - 1) // ROWS
    ACROSS: tl.constexpr = (OW + COLUMNS - 1) // COLUMNS
    thread = tl.program_id(0) * THREADS + tl.arange(0, THREADS)[:, None]
    # Threads behind the last tile compute that one once more and store nothing: so no load needs a mask for them.
    tile = tl.minimum(thread // GROUPS, tiles - 1)
    c = (thread % GROUPS) * CHANNELS + tl.arange(0, CHANNELS)[None, :]
    h, w, n = (tile // ACROSS % DOWN) * ROWS, (tile % ACROSS) * COLUMNS, (tile // (ACROSS * DOWN)).to(tl.int64)
    top, left = h * SH - PH, w * SW - PW
    corner = x + ((n * H + top) * W + left) * C + c
    weight += c * WEIGHT_C
    first = tl.load(bias + c).to(tl.float32) if BIAS else tl.zeros((THREADS, CHANNELS), tl.float32)
    totals = ()
    for _ in tl.static_range(ROWS * COLUMNS):
        totals = totals + (first,)
    if UNROLL:
        LAST_TOP: tl.constexpr = (DOWN - 1) * ROWS * SH - PH
        factors = ()
        for row in tl.static_range((ROWS - 1) * SH + (KH - 1) * DH + 1):
            if _tap(row, 0, SH, DH, KH) >= 0:
                factors = _load_factors(factors, weight + (row // DH) * WEIGHT_H, WEIGHT_W, KW)
            if _used(row, ROWS, SH, DH, KH):
                valid = (top + row >= 0) & (top + row < H)
                totals = _add_row(
                    totals, factors, corner + row * (W * C), valid, left, row < PH or LAST_TOP + row >= H, row, ROWS,
                    COLUMNS, C, W, OW, KH, KW, SH, SW, PW, DH, DW,
                )  # fmt: skip
    else:
        for kh in range(KH):
            factors = _load_factors((), weight + kh * WEIGHT_H, WEIGHT_W, KW)
            valid = (top + kh * DH >= 0) & (top + kh * DH < H)
            totals = _add_row(
                totals, factors, corner + kh * (DH * W * C), valid, left, True, 0, 1,
                COLUMNS, C, W, OW, 1, KW, 1, SW, PW, 1, DW,
            )  # fmt: skip
    place = ((n * OH + h) * OW + w) * C + c
    mine = thread < tiles * GROUPS
    for row in tl.static_range(ROWS):
        for column in tl.static_range(COLUMNS):
            total = totals[row * COLUMNS + column]
            here = place + (row * OW + column) * C
            inside = mine & (h + row < OH) & (w + column < OW)
            if RESIDUAL:
                total += tl.load(residual + here, mask=inside, other=0.0).to(tl.float32)
            tl.store(y + here, _activate(total, ACTIVATION).to(y.dtype.element_ty), mask=inside)


def depthwise(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    residual: torch.Tensor | None,
    y: torch.Tensor,
    geometry: Geometry,
    activation: str,
    tile: Tile,
) -> torch.Tensor:
    """A depthwise convolution [+ bias] [+ residual] and its activation, of channels-last tensors, into `y`."""
    (_, channels, height, width), (batch, _, out_height, out_width) = x.shape, y.shape
    weight_c, _, weight_h, weight_w = weight.stride()
    kernel = weight.shape[2], weight.shape[3]
    groups = channels // tile.channels
    count = batch * triton.cdiv(out_height, tile.rows) * triton.cdiv(out_width, tile.columns)
    launch(
        _depthwise, (triton.cdiv(count * groups, 32 * _WARPS),),
        x, weight, bias, residual, y, count, weight_c, weight_h, weight_w,
        channels, height, width, out_height, out_width,
        *kernel, *geometry.stride, *geometry.padding, *geometry.dilation,
        BIAS=bias is not None, RESIDUAL=residual is not None, ACTIVATION=activation,
        ROWS=tile.rows, COLUMNS=tile.columns, CHANNELS=tile.channels, GROUPS=groups, THREADS=32 * _WARPS,
        UNROLL=tile.rows > 1 or kernel[0] * kernel[1] <= _UNROLLED,
        num_warps=_WARPS, num_stages=1,
    )  # fmt: skip
    return y
