"""The kernel of a network's first convolution: what it takes, and what it is compiled to; neither needs a GPU."""

import re
from collections import Counter

import pytest

from torchaccel.probes import import_problem

if import_problem("triton"):
    pytest.skip(str(import_problem("triton")), allow_module_level=True)

import torch
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, compile

from torchaccel.fused import triton_stem
from torchaccel.fused.geometry import Geometry

TWO = Geometry((2, 2), (3, 3))


def takes(
    x: tuple[int, ...] = (1, 4, 224, 224), geometry: Geometry = TWO, width: int = 7, **options: torch.dtype
) -> bool:
    dtype = options.get("dtype", torch.float16)
    weight = torch.empty((64, 4, 7, width), dtype=dtype, device="meta")
    return triton_stem.takes(torch.empty(x, dtype=dtype, device="meta"), weight, geometry)


def test_it_takes_a_first_layer_alone() -> None:
    assert takes()
    assert takes((8, 4, 33, 14), Geometry((2, 2)), dtype=torch.bfloat16)
    assert not takes((1, 3, 224, 224))
    assert not takes((1, 4, 224, 223)), "pixels are read in pairs"
    assert not takes((0, 4, 224, 224))
    assert not takes((2**14, 4, 256, 256)), "more pixels than 30 bits number"
    assert not takes(dtype=torch.float32)
    assert not takes(width=16)
    for other in (Geometry(), Geometry((2, 1)), Geometry((2, 2), dilation=(2, 2)), Geometry((2, 2), groups=4)):
        assert not takes(geometry=other)


@pytest.mark.parametrize(("window", "channels"), [(7, 64), (3, 32)])
def test_pixels_are_read_16_bytes_at_a_time(window: int, channels: int) -> None:
    tile = triton_stem.TILES[0]
    depth = 4 * (window + 1)
    loads = Counter(re.findall(r"ld\.global\.\S+", _ptx(window, channels, depth, tile)))
    threads = 32 * tile.warps
    assert loads["ld.global.v4.b32"] == tile.outputs * depth // 8 // threads
    assert "ld.global.b16" not in loads


def _ptx(window: int, channels: int, depth: int, tile: triton_stem.Tile) -> str:
    kernel = triton_stem._stem
    constants = {
        **{"KH": window, "KW": window, "PH": window // 2, "PW": window // 2, "C": channels},
        **{"BIAS": True, "ACTIVATION": "relu", "BLOCK_M": tile.outputs, "BLOCK_N": channels, "BLOCK_K": depth},
    }
    sizes = ["outputs", "H", "W", "OH", "OW"]
    pointers = ["x", "weight", "bias", "y"]
    signature = dict.fromkeys(pointers, "*fp16") | dict.fromkeys(sizes, "i32") | dict.fromkeys(constants, "constexpr")
    place = {name: (number,) for number, name in enumerate(kernel.arg_names)}
    source = ASTSource(
        kernel,
        {name: signature[name] for name in kernel.arg_names},
        {place[name]: value for name, value in constants.items()},
        {place[name]: [["tt.divisibility", 16]] for name in (*pointers, *sizes)},
    )
    options = {"num_warps": tile.warps, "num_stages": tile.stages}
    text = compile(source, target=GPUTarget("cuda", 90, 32), options=options).asm["ptx"]
    assert isinstance(text, str)
    return text
