"""The tiles of the depthwise convolution and of the mean, and what its kernel is compiled to: neither needs a GPU."""

import re
from collections import Counter

import pytest

from torchaccel.probes import import_problem

if import_problem("triton"):
    pytest.skip(str(import_problem("triton")), allow_module_level=True)

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from torchaccel.fused import triton_depthwise
from torchaccel.fused.triton_depthwise import Tile, tiles
from torchaccel.fused.triton_kernels import mean_vectors


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize("shape", [(32, 72, 56, 56), (32, 960, 7, 7), (1, 200, 14, 14), (2, 70, 9, 9), (1, 1, 1, 1)])
def test_every_problem_has_a_few_tiles_that_divide_its_channels(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for size in (1, 3, 7):
        found = tiles(shape, dtype, (size, size))
        assert 1 <= len(found) == len(set(map(str, found))) <= 3
        for tile in found:
            assert shape[1] % tile.channels == 0 and tile.channels * dtype.itemsize <= 16


def test_no_tile_where_nothing_is_computed_or_the_window_is_too_wide_to_be_written_out() -> None:
    assert tiles((0, 8, 9, 9), torch.float16, (3, 3)) == []
    assert tiles((1, 8, 9, 9), torch.float16, (3, 33)) == []
    assert tiles((1, 8, 9, 9), torch.float16, (33, 3))


# What was the best on an H200: batch, channels, output's size, window, tile.
@pytest.mark.parametrize(
    "batch, channels, size, window, best",
    [
        (32, 72, 56, 3, "4x4x4"),
        (32, 96, 56, 7, "1x14x4"),
        (32, 72, 28, 5, "4x4x4"),
        (32, 120, 28, 5, "4x4x4"),
        (32, 192, 28, 7, "1x14x4"),
        (32, 200, 14, 3, "1x7x4"),
        (32, 184, 14, 3, "1x7x4"),
        (32, 384, 14, 7, "1x14x4"),
        (32, 768, 7, 7, "1x7x4"),
    ],
)
def test_the_best_tiles_that_were_measured_are_among_them(
    batch: int, channels: int, size: int, window: int, best: str
) -> None:
    assert best in map(str, tiles((batch, channels, size, size), torch.float16, (window, window)))


@pytest.mark.parametrize("size, best", [(112, 1), (56, 1), (28, 2), (14, 4), (7, 8), (1, 8)])
def test_the_mean_s_best_vectors_that_were_measured_are_among_them(size: int, best: int) -> None:
    found = mean_vectors((32, 960, size, size))
    assert best in found
    assert len(found) <= 2


def test_tiles_are_smaller_where_there_is_too_little_work_for_a_gpu() -> None:
    assert list(map(str, tiles((1, 96, 14, 14), torch.float16, (7, 7)))) == ["1x4x4", "1x2x4", "1x1x4"]
    assert list(map(str, tiles((1, 72, 112, 112), torch.float16, (3, 3)))) == ["2x4x4", "1x7x4", "1x4x4"]


def test_tiles_do_not_reach_far_beyond_the_border() -> None:
    assert list(map(str, tiles((32, 960, 7, 7), torch.float16, (5, 5)))) == ["1x7x4", "1x4x4", "1x2x4"]
    assert list(map(str, tiles((32, 960, 1, 1), torch.float16, (5, 5)))) == ["1x1x4"]


@pytest.mark.parametrize("channels", [72, 96])
def test_all_memory_is_read_8_bytes_at_a_time_and_no_input_twice(channels: int) -> None:
    for tile in (Tile(1, 4, 4), Tile(4, 4, 4)):
        loads = Counter(re.findall(r"ld\.global\.\S+", _ptx(channels, tile)))
        rows, columns, weights, bias = tile.rows + 2, tile.columns + 2, 9, 1
        assert loads == {"ld.global.v2.b32": rows * columns + weights + bias}


def _ptx(channels: int, tile: Tile) -> str:
    """Of a 3×3 convolution on half precision, its weights stored [height, width, channels]."""
    kernel = triton_depthwise._depthwise
    constants = {
        **{
            "WEIGHT_C": 1,
            "WEIGHT_H": 3 * channels,
            "WEIGHT_W": channels,
            "C": channels,
            "GROUPS": channels // tile.channels,
        },
        **dict.fromkeys(("H", "W", "OH", "OW"), 56),
        **dict.fromkeys(("KH", "KW"), 3),
        **dict.fromkeys(("SH", "SW", "PH", "PW", "DH", "DW"), 1),
        **{"residual": None, "BIAS": True, "RESIDUAL": False, "ACTIVATION": "relu", "UNROLL": True},
        **{"ROWS": tile.rows, "COLUMNS": tile.columns, "CHANNELS": tile.channels, "THREADS": 128},
    }
    pointers = ["x", "weight", "bias", "y"]
    signature = dict.fromkeys(pointers, "*fp16") | {"tiles": "i32"} | dict.fromkeys(constants, "constexpr")
    place = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {name: signature[name] for name in kernel.arg_names},
        {place[name]: value for name, value in constants.items()},
        {place[name]: [["tt.divisibility", 16]] for name in pointers},
    )
    text = compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 4}).asm["ptx"]
    assert isinstance(text, str)
    return text
