"""Which kernels are timed for which convolution, and those that run on a CPU too."""

import pytest

from torchaccel.probes import import_problem

if import_problem("triton"):
    pytest.skip(str(import_problem("triton")), allow_module_level=True)

import torch

from torchaccel.fused import cudnn_plans, gpu_convolutions
from torchaccel.fused.geometry import Geometry
from torchaccel.fused.gpu_convolutions import Convolution, candidates
from torchaccel.fused.reference import ACTIVATIONS, conv_bias_act

PADDED = Geometry(padding=(1, 1))


@pytest.fixture
def _everything(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of it is there: cuDNN's graph API and a Hopper GPU."""
    monkeypatch.setattr(cudnn_plans, "problem", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))


def call(
    x: tuple[int, ...],
    weight: tuple[int, ...],
    geometry: Geometry = PADDED,
    activation: str = "relu",
    *,
    dtype: torch.dtype = torch.float16,
    residual: bool = False,
) -> Convolution:
    given = torch.zeros(x, dtype=dtype), torch.zeros(weight, dtype=dtype), torch.zeros(weight[0], dtype=dtype)
    rest = torch.zeros(geometry.output(x, weight), dtype=dtype) if residual else None
    return Convolution(*given, rest, geometry, activation)


def kinds(call: Convolution) -> list[str]:
    """The candidates, with one name for all of Triton's."""
    return list(dict.fromkeys("triton" if name.startswith("triton ") else name for name in candidates(call)))


@pytest.mark.usefixtures("_everything")
def test_what_is_timed() -> None:
    pixels, square, pointwise = (2, 64, 28, 28), (64, 64, 3, 3), (64, 64, 1, 1)
    assert kinds(call(pixels, square)) == ["aten", "cudnn", "plan"]
    assert kinds(call(pixels, square, activation="silu")) == ["aten", "plan"]
    assert kinds(call(pixels, square, activation="hardswish")) == ["aten"]
    assert kinds(call(pixels, square, dtype=torch.float32)) == ["aten", "cudnn"]
    assert kinds(call(pixels, pointwise, Geometry())) == ["aten", "cudnn", "matmul", "plan"]
    assert kinds(call(pixels, pointwise, Geometry(), "silu")) == ["aten", "matmul", "triton", "plan"]
    assert kinds(call(pixels, pointwise, Geometry(), "hardswish")) == ["aten", "matmul", "triton"]
    assert kinds(call(pixels, pointwise, Geometry(), "silu", residual=True)) == ["aten", "matmul", "plan"]
    assert kinds(call(pixels, pointwise, Geometry((2, 2)), "none")) == ["aten"], "too little is left"
    first, window, strided = (2, 4, 64, 64), (64, 4, 7, 7), Geometry((2, 2), (3, 3))
    assert kinds(call(first, window, strided)) == ["aten", "cudnn", "triton", "plan"]
    assert kinds(call(first, window, strided, "hardswish")) == ["aten", "triton"]
    assert kinds(call(first, window, strided, residual=True)) == ["aten", "cudnn", "plan"]
    assert kinds(call(first, window, strided, dtype=torch.float32)) == ["aten", "cudnn"]


@pytest.mark.usefixtures("_everything")
def test_depthwise_convolutions_and_tiny_ones_are_not_searched_for_plans() -> None:
    for dtype in gpu_convolutions.DTYPES:
        assert kinds(call((32, 72, 28, 28), (72, 1, 3, 3), Geometry(padding=(1, 1), groups=72), dtype=dtype)) == [
            "aten",
            "triton",
        ]
    wide = Geometry(padding=(0, 20), groups=72)
    assert kinds(call((32, 72, 28, 28), (72, 1, 1, 41), wide)) == ["aten", "cudnn", "plan"]
    assert kinds(call((32, 672, 1, 1), (168, 672, 1, 1), Geometry())) == ["aten", "cudnn", "matmul"]


@pytest.mark.usefixtures("_everything")
def test_pytorch_s_benchmark_runs_only_for_what_is_large_and_has_no_plans() -> None:
    def timed(call: Convolution) -> list[bool]:
        found = candidates(call)
        return [found[name].args[1] for name in ("aten", "cudnn") if name in found]  # type: ignore[attr-defined]

    assert timed(call((2, 64, 28, 28), (64, 64, 3, 3))) == [False, False]
    assert timed(call((2, 64, 28, 28), (64, 64, 3, 3), dtype=torch.float32)) == [True, True]
    assert timed(call((2, 64, 28, 28), (64, 64, 3, 3), activation="hardswish")) == [True]
    assert timed(call((2, 8, 8, 8), (8, 8, 3, 3), dtype=torch.float32)) == [False, False]
    assert timed(call((2, 64, 28, 28), (64, 1, 3, 3), Geometry(groups=64))) == [False]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_pytorch_s_kernels_compute_what_the_reference_does(activation: str, with_residual: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 6, 5, 7).to(memory_format=torch.channels_last)
    weight, bias = torch.randn(4, 6, 1, 1), torch.randn(4)
    residual = torch.randn(2, 4, 5, 7).to(memory_format=torch.channels_last) if with_residual else None
    given = x, weight, bias, residual
    expected = conv_bias_act(*given, (1, 1), (0, 0), (1, 1), 1, activation)
    one = Convolution(*given, Geometry(), activation)
    for result in (gpu_convolutions.aten(one), gpu_convolutions.matmul(one)):
        torch.testing.assert_close(result, expected)
        assert result.is_contiguous(memory_format=torch.channels_last)


def test_cudnn_s_flags_are_put_back() -> None:
    flags = torch.backends.cudnn
    before = flags.benchmark, flags.benchmark_limit, flags.deterministic
    with pytest.raises(RuntimeError), gpu_convolutions._cudnn(timed=True):
        assert (flags.benchmark, flags.benchmark_limit, flags.deterministic) == (True, 0, True)
        raise RuntimeError("cuDNN")
    assert (flags.benchmark, flags.benchmark_limit, flags.deterministic) == before
