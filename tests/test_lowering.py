"""What is written in other operators for a backend: where it applies, and that it computes the same."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn
from torch.nn import functional as F

from tests.helpers import Lambda, captured, relative_error, run_program, settled
from torchaccel.lowering import decompose_hardswish, space_to_depth, widen_depthwise
from torchaccel.program import Program

SHAPE = (2, 4, 8, 8)


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, **options})


# --- HardSwish ---


def hardswish(in_place: bool, view: bool) -> nn.Module:
    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * 1.0
        alias = y.view(-1)
        z = F.hardswish(y, inplace=in_place)
        return z + alias if view else z

    return Lambda(forward)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("view", [False, True], ids=["", "a view"])
def test_hardswish_is_decomposed_in_bfloat16_alone_and_stays_what_it_was(
    precision: str, in_place: bool, view: bool
) -> None:
    x = torch.linspace(-5, 5, 101)
    module = hardswish(in_place, view)
    program = captured(module, x, precision=precision)
    decompose_hardswish(program.exported)
    left = [node for node in program.exported.graph.nodes if "hardswish" in str(node.target)]
    if precision == "fp16":
        assert left
    elif not in_place:
        assert not left
    with torch.no_grad():
        assert relative_error(run_program(program, module, x.to(program.inputs[0].dtype)), module(x)) < 1e-2


# --- depthwise convolutions ---


def test_depthwise_convolutions_in_bfloat16_can_be_computed_in_fp32_on_weights_that_are_not_rounded() -> None:
    torch.manual_seed(0)
    depthwise, full, grouped = conv(groups=4, padding=1), conv(in_channels=8), conv(in_channels=8, groups=2)
    module = settled(nn.Sequential(depthwise, nn.BatchNorm2d(8), nn.ReLU(), full, grouped))
    x = torch.randn(SHAPE)
    program = captured(module, x, precision="bf16")
    widen_depthwise(program.exported, program.rules)
    result = run_program(program, module, x.bfloat16())
    assert result.dtype is torch.bfloat16
    with torch.no_grad():
        assert relative_error(result, module(x)) < 1e-2
    dtypes = {name.removeprefix("module."): tensor.dtype for name, tensor in program.exported.state_dict.items()}
    assert dtypes["0.weight"] is torch.float32
    assert {dtypes[name] for name in ("3.weight", "3.bias", "4.weight", "4.bias")} == {torch.bfloat16}
    for node in program.exported.graph.nodes:
        if "conv2d" in str(node.target):
            assert len({argument.meta["val"].dtype for argument in node.args[:3]}) == 1
    scale = (module[1].weight.double() / (module[1].running_var.double() + module[1].eps).sqrt()).reshape(-1, 1, 1, 1)
    exact = module[0].weight.double() * scale
    assert relative_error(program.exported.state_dict["module.0.weight"], exact) < 1e-7


@pytest.mark.parametrize("precision", ["fp16", "fp32"])
def test_depthwise_convolutions_of_other_precisions_stay_as_they_are(precision: str) -> None:
    program = captured(nn.Sequential(conv(groups=4)), torch.randn(SHAPE), precision=precision)
    before = str(program.exported.graph)
    widen_depthwise(program.exported, program.rules)
    assert str(program.exported.graph) == before


def test_a_depthwise_weight_that_two_convolutions_share_stays_as_it_is() -> None:
    module = Lambda(lambda self, x: self.conv(self.conv(x)), conv=nn.Conv2d(4, 4, 3, groups=4))
    program = captured(module, torch.randn(SHAPE), precision="bf16")
    widen_depthwise(program.exported, program.rules)
    assert {rule.dtype for rule in program.rules.values()} == {torch.bfloat16}


# --- convolutions on few channels ---


def convolutions(program: Program) -> list[Any]:
    return [node for node in program.exported.graph.nodes if "conv2d" in str(node.target)]


class Shapes(fx.Interpreter):
    """Whether each operator of a graph returns what its node says."""

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op == "call_function":
            assert result.shape == n.meta["val"].shape
        return result


@settings(max_examples=60)
@given(data=st.data())
def test_a_strided_convolution_on_few_channels_becomes_one_of_stride_1_that_computes_the_same(data: Any) -> None:
    draw = data.draw
    channels, stride = draw(st.integers(1, 4)), draw(st.sampled_from([2, 4, 6]))
    kernel = draw(st.tuples(st.integers(1, 8), st.integers(1, 8)))
    padding = draw(st.tuples(st.integers(0, 4), st.integers(0, 4)))
    size = [draw(st.integers(max(1, taken - 2 * beside), 20)) for taken, beside in zip(kernel, padding, strict=True)]
    options = {"in_channels": channels, "stride": stride, "padding": padding, "bias": draw(st.booleans())}
    module = conv(kernel_size=kernel, **options).double()
    x = torch.randn(2, channels, *size, dtype=torch.float64)
    program = captured(module, x)
    rules = dict(program.rules)
    space_to_depth(program.exported)
    (node,) = convolutions(program)
    reached = [(n + 2 * p - k) // stride * stride + k - p for n, p, k in zip(size, padding, kernel, strict=True)]
    is_changed = max(kernel) > 3 and all(
        -(-k // stride) * stride - k + end >= n for k, end, n in zip(kernel, reached, size, strict=True)
    )
    assert (len(node.args) == 3 and node.args[0].meta["val"].shape[1] % 8 == 0) == is_changed
    assert program.rules == rules, "each weight of the engine is the module's own"
    with torch.no_grad():
        result, expected = run_program(program, module, x.float()), module(x)
    assert (result.double() - expected).norm() <= 1e-6 * expected.norm()
    Shapes(program.exported.module(check_guards=False)).run(x.float())


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"stride": 3},
        {"stride": (2, 1)},
        {"stride": 2, "dilation": 2},
        {"stride": 2, "groups": 2},
        {"stride": 2, "in_channels": 5},
        {"stride": 2, "kernel_size": 3},
    ],
    ids=str,
)
def test_other_convolutions_stay_as_they_are(options: dict[str, Any]) -> None:
    module = conv(**{"kernel_size": 4, **options})
    program = captured(module, torch.randn(2, module.in_channels, 8, 8))
    before = str(program.exported.graph)
    space_to_depth(program.exported)
    assert str(program.exported.graph) == before


@pytest.mark.parametrize("dilation", [1, 2])
def test_arguments_by_keyword_count_too(dilation: int) -> None:
    module = conv(kernel_size=4, stride=2, padding=1, dilation=dilation)
    program, x = captured(module, torch.randn(SHAPE)), torch.randn(SHAPE)
    (node,) = convolutions(program)
    node.args = node.args[:3]
    node.kwargs = {"stride": [2, 2], "padding": [1, 1], "dilation": [dilation] * 2}
    space_to_depth(program.exported)
    assert bool(node.kwargs) == (dilation == 2), "one that is dilated stays as it is"
    assert relative_error(run_program(program, module, x), module(x)) < 1e-6


def test_a_batch_stays_dynamic() -> None:
    module = conv(kernel_size=4, stride=2, padding=1)
    program = captured(module, torch.randn(4, 4, 8, 8), dynamic_batch=(1, 4, 8))
    space_to_depth(program.exported)
    assert not isinstance(convolutions(program)[0].args[0].meta["val"].shape[0], int)
    x = torch.randn(7, 4, 8, 8)
    assert relative_error(run_program(program, module, x), module(x)) < 1e-6


@pytest.mark.parametrize("shared", [False, True])
def test_batch_norm_is_folded_before(shared: bool) -> None:
    torch.manual_seed(0)
    first = conv(kernel_size=4, stride=2)
    if shared:
        module: nn.Module = Lambda(lambda self, x: self.conv(x) + self.conv(x * 2), conv=first)
    else:
        module = settled(nn.Sequential(first, nn.BatchNorm2d(8), nn.ReLU()))
    x = torch.randn(SHAPE)
    program = captured(module, x)
    space_to_depth(program.exported)
    assert program.folded == (not shared)
    assert relative_error(run_program(program, module, x), module(x)) < 1e-6
