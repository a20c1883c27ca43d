"""backend="fused" on the GPU: its kernels, its operators and whole models, and its weights under a captured graph."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import torchaccel
from tests.gpu.helpers import need, relative_error, served_by_engine
from tests.helpers import assert_served_afresh
from tests.models import ZOO, SmallConvNet, look_trained
from torchaccel.backends.fused import Fused
from torchaccel.compiler import BACKENDS
from torchaccel.precision import PRECISIONS, tf32_state

LAST = torch.channels_last
# What PyTorch 2.11 says when it imports Inductor.
pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit.script_method. is deprecated:DeprecationWarning")
BOUNDS = {torch.float16: 2e-3, torch.bfloat16: 2e-2, torch.float32: 1e-5}
DTYPES = list(BOUNDS)


@pytest.fixture(autouse=True)
def _usable() -> None:
    need("fused")


def batch(*shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, device="cuda").to(dtype).to(memory_format=LAST)


def apart(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result.double() - expected.double()).norm() / expected.double().norm())


# --- operators ---

CONVOLUTIONS: dict[str, tuple[tuple[int, ...], tuple[int, ...], tuple[Any, ...]]] = {
    "3x3": ((2, 64, 56, 56), (64, 64, 3, 3), ([1, 1], [1, 1], [1, 1], 1)),
    "strided": ((2, 64, 56, 56), (128, 64, 3, 3), ([2, 2], [1, 1], [1, 1], 1)),
    "1x1": ((2, 64, 28, 28), (256, 64, 1, 1), ([1, 1], [0, 0], [1, 1], 1)),
    "1x1 strided": ((2, 256, 28, 28), (512, 256, 1, 1), ([2, 2], [0, 0], [1, 1], 1)),
    "first": ((2, 4, 64, 64), (64, 4, 7, 7), ([2, 2], [3, 3], [1, 1], 1)),
    "three channels": ((2, 3, 64, 64), (16, 3, 3, 3), ([2, 2], [1, 1], [1, 1], 1)),
    "odd": ((3, 5, 13, 17), (7, 5, 3, 5), ([2, 1], [0, 2], [1, 2], 1)),
    "groups": ((2, 32, 14, 14), (64, 8, 3, 3), ([1, 1], [1, 1], [1, 1], 4)),
    "depthwise": ((2, 72, 28, 28), (72, 1, 5, 5), ([2, 2], [2, 2], [1, 1], 72)),
    "depthwise 7x7": ((2, 96, 14, 14), (96, 1, 7, 7), ([1, 1], [3, 3], [1, 1], 96)),
    "tiny": ((1, 8, 1, 1), (8, 8, 1, 1), ([1, 1], [0, 0], [1, 1], 1)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CONVOLUTIONS)
@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_a_convolution_computes_what_pytorch_does(name: str, dtype: torch.dtype, with_residual: bool) -> None:
    from torchaccel.fused import operators, reference  # noqa: F401 - importing makes the operators

    torch.manual_seed(0)
    shape, weight_shape, (stride, padding, dilation, groups) = CONVOLUTIONS[name]
    x, weight = batch(*shape, dtype=dtype), batch(*weight_shape, dtype=dtype) * 0.1
    bias = torch.randn(weight_shape[0], device="cuda").to(dtype)
    geometry = stride, padding, dilation, groups
    with tf32_state(False), torch.no_grad():
        plain = functional.conv2d(x, weight, None, *geometry)
        residual = batch(*plain.shape, dtype=dtype) if with_residual else None
        for activation in ("none", "relu", "silu"):
            doubles = [None if t is None else t.double() for t in (x, weight, bias, residual)]
            expected = reference.conv_bias_act(*doubles, *geometry, activation)
            for _ in range(2):  # the first run chooses, the second uses
                poison(expected, dtype)
                y = torch.ops.torchaccel.conv_bias_act(x, weight, bias, residual, *geometry, activation)
            assert y.is_contiguous(memory_format=LAST)
            assert apart(y, expected) < BOUNDS[dtype]


@pytest.mark.parametrize("with_residual", [False, True], ids=["", "residual"])
def test_every_kernel_of_a_convolution_ignores_what_its_output_s_memory_held(with_residual: bool) -> None:
    """cuDNN is handed the output as a residual times zero: NaN left in that memory must not come through."""
    from torchaccel.fused import gpu_convolutions
    from torchaccel.fused.geometry import Geometry

    x, weight, bias = batch(2, 64, 28, 28), batch(64, 64, 3, 3) * 0.1, torch.randn(64, device="cuda").half()
    residual = batch(2, 64, 28, 28) if with_residual else None
    for _ in range(20):
        poison(x, x.dtype)
        call = gpu_convolutions.Convolution(x, weight, bias, residual, Geometry(padding=(1, 1)), "relu")
        y = gpu_convolutions.cudnn(call)
        assert bool(y.isfinite().all())
        del y


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_cudnn_s_own_plans_are_found_right_and_can_be_captured(name: str) -> None:
    from torchaccel.fused import cudnn_plans, gpu_convolutions, reference
    from torchaccel.fused.geometry import Geometry

    if reason := cudnn_plans.problem():
        pytest.skip(reason)
    torch.manual_seed(0)
    shape, weight_shape, (*geometry, groups) = CONVOLUTIONS[name]
    x, weight, bias = batch(*shape), batch(*weight_shape) * 0.1, torch.randn(weight_shape[0], device="cuda").half()
    for activation, with_residual in (("relu", True), ("relu", False), ("none", True), ("silu", False)):
        plain = functional.conv2d(x, weight, None, *geometry, groups)
        residual = batch(*plain.shape) if with_residual else None
        doubles = [None if t is None else t.double() for t in (x, weight, bias, residual)]
        expected = reference.conv_bias_act(*doubles, *geometry, groups, activation)
        where = Geometry.of(*geometry, groups)
        call = gpu_convolutions.Convolution(x, weight, bias, residual, where, activation)
        try:
            result = gpu_convolutions.plan(call)
        except RuntimeError as error:
            print(f"{name}, {activation}, residual {with_residual}: {error}")
            assert "cuDNN has no plan" in str(error)
            assert name in ("odd", "three channels", "groups", "depthwise", "depthwise 7x7")
            continue
        assert apart(result, expected) < BOUNDS[torch.float16]
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = gpu_convolutions.plan(call)
        poison(captured, captured.dtype)
        graph.replay()
        assert torch.equal(captured, result)


def poison(like: torch.Tensor, dtype: torch.dtype) -> None:
    """Leave NaN in the memory that the next tensor of this size is given."""
    poisoned = [torch.full(like.shape, float("nan"), dtype=dtype, device="cuda") for _ in range(4)]
    del poisoned


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_pools_and_padding_compute_what_pytorch_does(dtype: torch.dtype) -> None:
    from torchaccel.fused import operators  # noqa: F401

    ours = torch.ops.torchaccel
    for shape, kernel, stride, padding, dilation, ceil_mode in (
        ((2, 64, 112, 112), [3, 3], [2, 2], [1, 1], [1, 1], False),
        ((3, 5, 13, 9), [2, 3], [2, 1], [1, 0], [1, 2], True),
        ((1, 200, 7, 7), [13, 13], [1, 1], [6, 6], [1, 1], False),
    ):
        x = batch(*shape, dtype=dtype)
        x[0, 0, 3, 3] = float("nan")
        result = ours.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
        expected = functional.max_pool2d(x, kernel, stride, padding, dilation, ceil_mode)
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)
    for shape in ((2, 512, 7, 7), (32, 70, 14, 9), (1, 3, 1, 1)):
        x = batch(*shape, dtype=dtype)
        assert apart(ours.mean_pixels(x), x.double().mean((2, 3))) < BOUNDS[dtype]
    for x in (batch(2, 3, 33, 17, dtype=dtype), batch(2, 3, 33, 17, dtype=dtype).contiguous()):
        padded = ours.pad_channels(x, 4)
        assert padded.is_contiguous(memory_format=LAST)
        assert torch.equal(padded[:, :3], x)
        assert not padded[:, 3].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["", "mask"])
def test_attention_computes_what_pytorch_does(dtype: torch.dtype, masked: bool) -> None:
    from torchaccel.fused import operators  # noqa: F401

    query, key, value = (torch.randn(2, 49, 4, 64, device="cuda").to(dtype).transpose(1, 2) for _ in range(3))
    mask = torch.rand(2, 1, 49, 49, device="cuda") > 0.3 if masked else None
    result = torch.ops.torchaccel.attention(query, key, value, mask, False, None, [0, 2, 1, 3])
    doubles = [tensor.double() for tensor in (query, key, value)]
    assert apart(result, functional.scaled_dot_product_attention(*doubles, mask)) < BOUNDS[dtype]


@pytest.mark.parametrize("order", [[0, 1, 2, 3], [2, 0, 1, 3]], ids=str)
def test_attention_reads_any_strides_and_writes_the_layout_that_it_is_told(order: list[int]) -> None:
    from torchaccel.fused import operators  # noqa: F401

    packed = torch.randn(197, 2, 3, 12, 64, device="cuda").half()
    tensors = [packed.select(2, index).permute(1, 2, 0, 3) for index in range(3)]
    result = torch.ops.torchaccel.attention(*tensors, None, False, None, order)
    assert result.permute(order).is_contiguous()
    doubles = [tensor.double() for tensor in tensors]
    assert apart(result, functional.scaled_dot_product_attention(*doubles)) < BOUNDS[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activation", ["none", "relu", "silu", "gelu", "gelu_tanh"])
def test_a_linear_layer_computes_what_pytorch_does(activation: str, dtype: torch.dtype) -> None:
    from torchaccel.fused import gpu, operators, reference, triton_linear  # noqa: F401

    for with_bias in (True, False):
        x, weight = (torch.randn(shape, device="cuda").to(dtype) for shape in ((201, 264), (520, 264)))
        bias = torch.randn(520, device="cuda").to(dtype) if with_bias else None
        with tf32_state(False), torch.no_grad():
            result = torch.ops.torchaccel.linear_act(x, weight, bias, activation)
            doubles = [None if tensor is None else tensor.double() for tensor in (x, weight, bias)]
            expected = reference.linear_act(*doubles, activation)
            assert apart(result, expected) < BOUNDS[dtype]
            if triton_linear.takes(x, weight, activation):
                for tiles in triton_linear.TILES:
                    result = gpu._triton_linear(x, weight, bias, activation, tiles)
                    assert apart(result, expected) < BOUNDS[dtype], tiles


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_first_layer_computes_what_pytorch_does(dtype: torch.dtype) -> None:
    from torchaccel.fused import reference, triton_stem
    from torchaccel.fused.geometry import Geometry
    from torchaccel.fused.tensors import empty

    cases = (((2, 4, 64, 96), (64, 4, 7, 7), (3, 3)), ((3, 4, 33, 50), (24, 4, 3, 3), (1, 0)))
    for shape, weight_shape, padding in cases:
        x, weight = batch(*shape, dtype=dtype), batch(*weight_shape, dtype=dtype) * 0.1
        bias, geometry = torch.randn(weight_shape[0], device="cuda").to(dtype), Geometry((2, 2), padding)
        assert triton_stem.takes(x, weight, geometry)
        doubles = [tensor.double() for tensor in (x, weight, bias)]
        for activation in reference.ACTIVATIONS:
            expected = reference.conv_bias_act(*doubles, None, (2, 2), padding, (1, 1), 1, activation)
            for tile in triton_stem.TILES:
                poison(expected, dtype)
                y = triton_stem.stem(x, weight, bias, empty(x, expected.shape), geometry, activation, tile)
                assert apart(y, expected) < BOUNDS[dtype], (activation, tile)


# --- models ---


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
@pytest.mark.parametrize("name", ZOO)
def test_models_compute_what_the_module_does(name: str, precision: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need("fused", precision)
    if precision == "bf16":  # Inductor has compiled the same program in fp16; that takes minutes in all
        monkeypatch.setitem(BACKENDS, "fused", Fused(routes=("plain",)))
    check(name, precision)


@pytest.mark.parametrize("precision", ["fp32", "tf32"])
def test_the_other_precisions(precision: str) -> None:
    need("fused", precision)
    check("resnet18", precision)


def check(name: str, precision: str) -> None:
    module = ZOO[name].module().cuda()
    model = torchaccel.compile(module, precision, backend="fused")
    args, kwargs = ZOO[name].inputs(2, "cuda")
    with torch.inference_mode(), tf32_state(False):
        result, expected = model(*args, **kwargs), module(*args, **kwargs)
    assert relative_error(result, expected) <= PRECISIONS[precision].bound
    assert served_by_engine(model)
    assert model.report().to_dict()["graph"] is True
    print(name, precision, model.report().engines[-1].library)


def test_a_dynamic_batch() -> None:
    module = look_trained(SmallConvNet()).cuda()
    model = torchaccel.compile(module, "fp16", backend="fused", dynamic_batch=(1, 4, 8))
    with torch.inference_mode():
        for size in (1, 3, 8):
            x = torch.randn(size, 3, 32, 32, device="cuda")
            assert relative_error(model(x), module(x)) <= PRECISIONS["fp16"].bound
    assert model.report().builds == 1


def test_all_kernels_that_are_timed_are_compiled_before_that(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    from torchaccel.fused import ahead

    torch.manual_seed(0)
    compiled_ahead: list[bool] = []
    monkeypatch.setattr(
        triton.knobs.runtime, "jit_post_compile_hook", lambda **kernel: compiled_ahead.append(ahead.is_compiling())
    )
    monkeypatch.setitem(BACKENDS, "fused", Fused(routes=("plain",)))
    layers = nn.Conv2d(3, 88, 3, 2, 1), nn.ReLU(), nn.Conv2d(88, 88, 3, padding=1, groups=88), nn.Hardswish()
    module = nn.Sequential(*layers, nn.MaxPool2d(3), nn.Conv2d(88, 88, 1), nn.AdaptiveAvgPool2d(1)).cuda()
    model = torchaccel.compile(module, "fp16", backend="fused", cache_dir=False)
    x = torch.randn(4, 3, 96, 96, device="cuda")
    with torch.inference_mode():
        assert relative_error(model(x), module(x)) <= PRECISIONS["fp16"].bound
    assert len(compiled_ahead) > 3
    assert all(compiled_ahead)


# --- weights ---


@torch.no_grad()
def test_new_weights_are_written_in_place_under_the_same_graph() -> None:
    module = ZOO["resnet18"].module().cuda()
    model = torchaccel.compile(module, "fp16", backend="fused")
    x = torch.randn(2, 3, 64, 64, device="cuda")
    first = model(x)
    graph = model.runner_for(x)._graph
    for parameter in module.parameters():
        parameter.add_(torch.randn_like(parameter) * 1e-2 * parameter.abs().mean())
    second = model(x)
    assert not torch.equal(first, second)
    assert model.runner_for(x)._graph is graph
    assert (model.report().builds, model.report().refreshes) == (1, 1)
    assert_served_afresh(model, x, fresh=copy.deepcopy(model))


class Functional(nn.Module):
    """A residual block as one writes it without classes for its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Parameter(torch.randn(64, 3, 7, 7) * 0.1)
        self.one, self.two = (nn.Parameter(torch.randn(64, 64, 3, 3) * 0.05) for _ in range(2))
        self.biases = nn.ParameterList(torch.randn(64) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(functional.conv2d(x, self.stem, self.biases[0], stride=2, padding=3))
        x = functional.max_pool2d(x, 3, 2, 1)
        y = functional.conv2d(x, self.one, self.biases[1], padding=1).relu()
        y = functional.conv2d(y, self.two, self.biases[2], padding=1)
        return torch.relu(x + y).mean((2, 3))


def test_a_functional_network_runs_the_same_kernels() -> None:
    torch.manual_seed(0)
    model = torchaccel.compile(Functional().cuda(), "fp16", backend="fused")
    x = torch.randn(2, 3, 64, 64, device="cuda")
    with torch.inference_mode():
        assert relative_error(model(x), model.module(x)) <= PRECISIONS["fp16"].bound
    (built,) = model._state.built.values()
    operators = [str(node.target) for node in built.plan.payload.exported.graph.nodes if node.op == "call_function"]
    assert {name.split(".")[0] for name in operators} == {"torchaccel"}
