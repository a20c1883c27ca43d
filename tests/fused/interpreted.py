"""Run by `test_triton_kernels.py` in a process of its own, under TRITON_INTERPRET=1: the kernels against PyTorch."""

import traceback

import torch
from torch.nn import functional

from torchaccel.fused import triton_depthwise, triton_linear, triton_stem
from torchaccel.fused import triton_kernels as kernels
from torchaccel.fused.geometry import Geometry
from torchaccel.fused.reference import ACTIVATIONS, conv_bias_act, linear_act
from torchaccel.fused.triton_depthwise import Tile

LAST = torch.channels_last


def batch(*shape: int) -> torch.Tensor:
    return torch.randn(shape).to(memory_format=LAST)


def like(y: torch.Tensor) -> torch.Tensor:
    return torch.full_like(y, float("nan"), memory_format=LAST)


def max_pool() -> None:
    cases = [
        (batch(2, 5, 9, 7), (3, 3), (2, 2), (1, 1), (1, 1), False),
        (batch(1, 33, 6, 8), (2, 3), (1, 2), (0, 1), (2, 1), False),
        (batch(2, 3, 8, 8), (3, 3), (2, 2), (0, 0), (1, 1), True),
        (batch(3, 130, 3, 3), (3, 3), (1, 1), (1, 1), (1, 1), False),
        (batch(1, 4, 9, 9), (8, 8), (1, 1), (4, 4), (1, 1), False),
        (batch(1, 4, 5, 5) * float("-inf"), (2, 2), (2, 2), (0, 0), (1, 1), False),
        (torch.full((1, 4, 5, 5), float("-inf")), (2, 2), (2, 2), (0, 0), (1, 1), False),
    ]
    for x, *geometry, ceil_mode in cases:
        expected = functional.max_pool2d(x, *geometry, ceil_mode=ceil_mode)
        result = kernels.max_pool(x.to(memory_format=LAST), like(expected), *geometry)
        assert torch.equal(result.isnan(), expected.isnan()), geometry
        assert torch.equal(result.nan_to_num(), expected.nan_to_num()), geometry


def mean_pixels() -> None:
    for shape in ((2, 5, 7, 7), (1, 70, 9, 11), (3, 32, 1, 1)):
        x = batch(*shape)
        for vectors in (1, 4):
            torch.testing.assert_close(kernels.mean_pixels(x, x.new_empty(shape[:2]), vectors), x.mean((2, 3)))


def pad_channels() -> None:
    for x in (torch.randn(2, 3, 5, 7), batch(2, 3, 5, 7), torch.randn(2, 9, 5, 7)[:, ::3]):
        expected = functional.pad(x, (0, 0, 0, 0, 0, 1))
        assert torch.equal(kernels.pad_channels(x, like(expected)), expected)


def depthwise() -> None:
    geometries = [
        (batch(2, 6, 8, 9), (3, 3), (1, 1), (1, 1), (1, 1)),
        (batch(1, 4, 8, 8), (9, 6), (1, 1), (4, 3), (1, 1)),
        (batch(1, 70, 7, 7), (5, 3), (2, 1), (2, 0), (1, 2)),
        (batch(1, 8, 11, 10), (3, 3), (2, 2), (1, 1), (2, 2)),
        (batch(1, 8, 11, 10), (2, 2), (3, 3), (0, 1), (1, 1)),
    ]
    wide, tall, lone = Tile(1, 4, 2), Tile(2, 3, 2), Tile(1, 1, 1)
    cases = [
        (geometry, tile, "relu") for geometry, tile in zip(geometries, (wide, wide, lone, wide, wide), strict=True)
    ]
    cases += [(geometries[0], lone, "none"), *((geometries[number], tall, "none") for number in (0, 3, 4))]
    cases += [(geometries[0], wide, activation) for activation in ACTIVATIONS]
    for (x, kernel, *geometry), tile, activation in cases:
        channels = x.shape[1]
        for layout, has_bias, has_residual in ((LAST, True, False), (torch.contiguous_format, False, True)):
            weight = torch.randn(channels, 1, *kernel).to(memory_format=layout)
            weight = weight if has_bias else weight.movedim(0, -1).contiguous().movedim(-1, 0)
            plain = conv_bias_act(x, weight, None, None, *geometry, channels, "none")
            bias = torch.randn(channels) if has_bias else None
            residual = batch(*plain.shape) if has_residual else None
            expected = conv_bias_act(x, weight, bias, residual, *geometry, channels, activation)
            result = triton_depthwise.depthwise(
                x, weight, bias, residual, like(plain), Geometry(*geometry), activation, tile
            )
            torch.testing.assert_close(result, expected, msg=f"{x.shape}, {kernel}, {geometry}, {tile}, {activation}")


def linear() -> None:
    # A view that begins where no descriptor may.
    x = torch.randn(70 * 72 + 1).half()[1:].view(70, 72)
    weight, bias = torch.randn(40, 72).half(), torch.randn(40).half()
    for activation in triton_linear.ACTIVATIONS:
        for given in (bias, None):
            tiles = triton_linear.Tiles(32, 16, 32, 1, 4, False)
            y = torch.full((70, 40), float("nan")).half()
            result = triton_linear.linear(x, weight, given, y, activation, tiles)
            wide = (None if tensor is None else tensor.float() for tensor in (x, weight, given))
            torch.testing.assert_close(result.float(), linear_act(*wide, activation), rtol=1e-3, atol=1e-3)


def stem() -> None:
    cases = [
        ((2, 12, 14), (64, 7, 7), (3, 3), "relu"),
        ((1, 9, 10), (24, 3, 3), (1, 1), "silu"),
        ((2, 9, 10), (7, 3, 3), (0, 0), "none"),
        ((1, 11, 6), (130, 5, 2), (4, 2), "relu"),
        ((1, 4, 2), (16, 1, 1), (0, 1), "gelu"),
    ]
    for (count, *size), (channels, *window), padding, activation in cases:
        x, weight = batch(count, 4, *size).half(), batch(channels, 4, *window).half() * 0.1
        geometry = Geometry((2, 2), padding)
        assert triton_stem.takes(x, weight, geometry)
        for bias in (torch.randn(channels).half(), None):
            wide = (None if tensor is None else tensor.float() for tensor in (x, weight, bias))
            expected = conv_bias_act(*wide, None, (2, 2), padding, (1, 1), 1, activation)
            for tile in (triton_stem.Tile(32, 4, 1), triton_stem.Tile(64, 4, 1)):
                y = like(expected).half()
                result = triton_stem.stem(x, weight, bias, y, geometry, activation, tile)
                torch.testing.assert_close(result.float(), expected, rtol=2e-3, atol=2e-3)


if __name__ == "__main__":
    for kernel in (max_pool, mean_pixels, pad_channels, depthwise, linear, stem):
        torch.manual_seed(0)
        try:
            kernel()
        except Exception:  # noqa: BLE001 - whatever it was, the other kernels are run too
            traceback.print_exc()
        else:
            print("right:", kernel.__name__)
