"""Each pass on programs that it should rewrite and on programs that it must leave alone: equal in fp32, on a CPU."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

from tests.fused.programs import CPU, FP32, check, lowered, operators
from tests.helpers import Lambda, relative_error, settled
from torchaccel.backends.fused import Fused
from torchaccel.backends.inductor import Inductor
from torchaccel.errors import BackendWarning
from torchaccel.fused import cudnn_plans
from torchaccel.fused.passes import PASSES
from torchaccel.program import Program
from torchaccel.weights import WeightStore


def activations(program: Program) -> list[str]:
    """The activation of each convolution of ours, with a + for a residual."""
    nodes = [node for node in program.exported.graph.nodes if "conv_bias_act" in str(node.target)]
    return [("+" if node.args[3] is not None else "") + str(node.args[8]) for node in nodes]


def conv(channels: int, out: int | None = None, size: int = 3, **options: Any) -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(channels, out or channels, size, **({"padding": size // 2} | options))


def images(channels: int = 8, size: int = 6, batch: int = 2) -> torch.Tensor:
    return torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(1))


# --- convolutions: what is fused ---

FUSED: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "relu": (lambda m, x: m.a(x).relu(), ["relu"]),
    "relu in place": (lambda m, x: m.a(x).relu_(), ["relu"]),
    "functional relu": (lambda m, x: functional.relu(m.a(x)), ["relu"]),
    "no bias": (lambda m, x: m.bare(x).relu(), ["relu"]),
    "no bias, no relu": (lambda m, x: m.bare(x).tanh(), ["none"]),
    "residual": (lambda m, x: (m.a(x) + x).relu(), ["+relu"]),
    "residual first": (lambda m, x: (x + m.a(x)).relu(), ["+relu"]),
    "residual in place": (lambda m, x: m.a(x).add_(x).relu_(), ["+relu"]),
    "residual used later": (lambda m, x: (m.a(x) + x).relu() * x, ["+relu"]),
    "two convolutions": (lambda m, x: (m.a(x) + m.b(x)).relu(), ["none", "+relu"]),
    "depthwise": (lambda m, x: m.depthwise(x) * 2, ["none"]),
    "depthwise, bare sum": (lambda m, x: (m.depthwise(x) + x).tanh(), ["+none"]),
    "depthwise, silu": (lambda m, x: functional.silu(m.depthwise(x), inplace=True), ["silu"]),
    "depthwise, relu6": (lambda m, x: functional.relu6(m.depthwise(x)), ["relu6"]),
    "depthwise, clamp 0 to 6": (lambda m, x: functional.hardtanh(m.depthwise(x), 0.0, 6.0), ["relu6"]),
    "depthwise, clamp -1 to 1": (lambda m, x: functional.hardtanh(m.depthwise(x)), ["none"]),
    "depthwise, hardswish, residual": (lambda m, x: functional.hardswish(m.depthwise(x) + x), ["+hardswish"]),
    "groups": (lambda m, x: m.grouped(x).relu(), ["relu"]),
    "dilation": (lambda m, x: m.dilated(x).relu(), ["relu"]),
    "padding by name, dilated": (lambda m, x: m.same_dilated(x).relu(), ["relu"]),
    "padding by name": (lambda m, x: m.same(x).relu(), ["relu"]),
    "no padding by name": (lambda m, x: functional.conv2d(x, m.a.weight, padding="valid").relu(), ["relu"]),
    "relu read twice": (lambda m, x: (y := m.a(x).relu()) * y.mean(), ["relu"]),
    "computed weight": (lambda m, x: functional.conv2d(x, m.a.weight * 2, m.a.bias).relu(), ["relu"]),
    "shared weight": (lambda m, x: m.a(m.a(x).relu()).relu(), ["relu", "relu"]),
}

# --- what cuDNN's own plans and the depthwise kernel take besides ---

BY_PLANS: dict[str, tuple[Callable[..., Any], list[str]]] = {
    "bias alone": (lambda m, x: m.a(x).tanh(), ["none"]),
    "bare sum": (lambda m, x: (m.a(x) + x).tanh(), ["+none"]),
    "bare sum read twice": (lambda m, x: (y := m.a(x) + x) * y.mean(), ["+none"]),
    "silu": (lambda m, x: functional.silu(m.a(x)), ["silu"]),
    "relu6 of a sum": (lambda m, x: functional.relu6(m.a(x) + x), ["+relu6"]),
    "convolution read twice, by plans": (lambda m, x: (y := m.a(x)).relu() + y, ["none"]),
    "two convolutions, by plans": (lambda m, x: (m.a(x) + m.b(x)).relu(), ["none", "+relu"]),
}

# --- and what is not: anything but these sums and activations, or where something else needs what is in between ---

LEFT: dict[str, Callable[..., Any]] = {
    "no relu": lambda m, x: m.a(x).tanh(),
    "convolution read twice": lambda m, x: (y := m.a(x)).relu() + y,
    "convolution returned too": lambda m, x: ((y := m.a(x)).relu(), y),
    "convolution added to itself": lambda m, x: (y := m.a(x)).add(y).sigmoid(),
    "scaled sum": lambda m, x: torch.add(x, m.a(x), alpha=2).relu(),
    "broadcast sum": lambda m, x: (m.a(x) + x[:, :, :1, :1]).relu(),
    "sum with a wider tensor": lambda m, x: (m.a(x) + x.double()).relu(),
    "sum with a number": lambda m, x: (m.a(x) + 1.5).relu(),
    "sum read twice": lambda m, x: (y := m.a(x) + x).relu() * y,
    "uneven padding": lambda m, x: m.even(x).relu(),
    "unbatched": lambda m, x: m.a(x[0]).relu(),
    "one-dimensional": lambda m, x: m.line(x[0]).relu(),
    "another activation": lambda m, x: functional.leaky_relu(m.a(x), 0.1),
    "two filters a channel": lambda m, x: functional.silu(m.doubled(x)),
    "complex numbers": lambda m, x: functional.conv2d(torch.complex(x, x), torch.complex(*[m.b.weight] * 2)).abs(),
    "view written to": lambda m, x: (y := m.a(x).mul(2), y.view(-1).relu_(), y)[2],
}


def block(function: Callable[..., Any]) -> nn.Module:
    return Lambda(
        function,
        a=conv(8),
        b=conv(8, size=1),
        bare=conv(8, bias=False),
        depthwise=conv(8, groups=8),
        grouped=conv(8, groups=2),
        dilated=conv(8, padding=2, dilation=2),
        doubled=conv(8, 16, groups=8),
        same=conv(8, padding="same"),
        same_dilated=conv(8, padding="same", dilation=2),
        even=conv(8, size=2, padding="same"),
        line=nn.Conv1d(6, 6, 3),
    ).eval()


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel:UserWarning")
@pytest.mark.parametrize("name", [*FUSED, *BY_PLANS, *LEFT])
def test_convolutions_take_in_what_follows_them_and_nothing_else(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    function, expected = FUSED.get(name) or BY_PLANS.get(name) or (LEFT[name], [])
    if name in BY_PLANS:
        monkeypatch.setattr(cudnn_plans, "possible", lambda x: True)
    module, x = block(function), images()
    program = lowered(module, x)
    found = activations(program)
    assert found == expected
    if name in FUSED:
        assert not {"conv2d", "relu", "relu_", "silu"} & set(operators(program))
    check(program, module, x)


def test_a_write_between_a_convolution_and_its_relu_keeps_them_apart() -> None:
    def write(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = x * 2
        z = m.a(y)
        y.view(-1).mul_(3)
        return z.relu() + y

    module, x = block(write), images()
    program = lowered(module, x)
    assert activations(program) == []
    check(program, module, x)


def test_operators_that_write_in_place_are_left_where_a_view_would_see_it() -> None:
    def seen(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        view = y.flatten(1)
        y.relu_()
        return view

    module, x = block(seen), images()
    program = lowered(module, x)
    assert operators(program)["relu_"] == 1
    check(program, module, x)


def test_an_operator_that_writes_in_place_is_read_by_all_that_come_after() -> None:
    def later(m: Any, x: torch.Tensor) -> torch.Tensor:
        y = m.a(x)
        before = y * 2
        y.relu_()
        return before + y.sum()

    module, x = block(later), images()
    program = lowered(module, x)
    assert not operators(program)["relu_"]
    check(program, module, x)


@pytest.mark.parametrize("write", [torch.Tensor.add_, torch.Tensor.mul_])
def test_what_writes_a_wider_number_in_place_still_gives_the_narrower(write: Callable[..., Any]) -> None:
    wide = torch.linspace(0, 1, 6, dtype=torch.float64)
    module, x = block(lambda m, x: m.b(write(m.a(x), wide.clone())).tanh()), images()
    program = lowered(module, x)
    assert {"add_", "mul_"} & set(operators(program))
    check(program, module, x)


# --- biases, channels, patches ---


def test_the_bias_of_a_residual_goes_into_the_other_convolution_s() -> None:
    module, x = block(lambda m, x: (m.a(x) + m.b(x)).relu()), images()
    program = lowered(module, x)
    (rule,) = [rule for rule in program.rules.values() if rule.function == "sum"]
    assert {part.sources for part in rule.parts} == {("a.bias",), ("b.bias",)}
    assert len(program.rules) == 3
    check(program, module, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (m.a(x) + m.b(x)).relu() + m.a.bias.sum(),  # read elsewhere too
        lambda m, x: (m.a(x) + (y := m.b(x))).relu() + y,  # the residual is needed with its bias
        lambda m, x: (m.bare(x) + m.b(x)).relu(),  # no bias to add to
        lambda m, x: (m.a(y := m.b(x)) + y).relu(),  # the convolution reads what its residual is
    ],
)
def test_a_bias_that_something_else_needs_stays(function: Callable[..., Any]) -> None:
    module, x = block(function), images()
    program = lowered(module, x)
    assert all(rule.function == "cast" for rule in program.rules.values())
    assert program.rules
    check(program, module, x)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_the_first_layer_has_four_input_channels_by_rule(precision: str) -> None:
    module = Lambda(lambda m, x: m.first(x).relu(), first=conv(3, 8)).eval()
    x = images(3)
    program = lowered(module, x, precision=precision)
    (rule,) = [rule for rule in program.rules.values() if rule.input_channels]
    weight = rule.compute(dict(module.named_parameters()))
    assert weight.shape == (8, 4, 3, 3)
    assert not weight[:, 3].any()
    assert torch.equal(weight[:, :3], module.first.weight.to(weight.dtype))
    assert "torchaccel::pad_channels" not in operators(program)  # its input is padded already
    if precision == "fp32":
        check(program, module, x)


def test_a_first_layer_whose_input_something_else_reads_pads_it() -> None:
    module = Lambda(lambda m, x: m.first(x).relu().sum() + x, first=conv(3, 8)).eval()
    program = lowered(module, images(3))
    assert operators(program)["torchaccel.pad_channels"] == 1
    check(program, module, images(3))


def test_a_first_layer_whose_residual_is_its_input_pads_it() -> None:
    module = Lambda(lambda m, x: (m.first(x) + x).relu(), first=conv(3, 3)).eval()
    program = lowered(module, images(3))
    assert operators(program)["torchaccel.pad_channels"] == 1
    check(program, module, images(3))


def test_a_first_layer_whose_input_is_a_constant_pads_it() -> None:
    module = Lambda(lambda m, x: m.first(m.picture).relu() + m.other(x), first=conv(3, 8), other=conv(8)).eval()
    module.picture = images(3)  # neither a parameter nor a buffer
    with pytest.warns(BackendWarning, match="picture"):
        program = lowered(module, images())
    assert operators(program)["torchaccel.pad_channels"] == 1
    check(program, module, images())


def test_a_weight_of_two_convolutions_is_not_padded() -> None:
    module = Lambda(lambda m, x: m.first(m.first(x).relu()).relu(), first=conv(3, 3)).eval()
    program = lowered(module, images(3))
    assert not any(rule.input_channels for rule in program.rules.values())
    check(program, module, images(3))


@pytest.mark.parametrize("channels", [1, 2, 4])
def test_only_three_channels_are_padded(channels: int) -> None:
    program = lowered(Lambda(lambda m, x: m.first(x).relu(), first=conv(channels, 8)).eval(), images(channels))
    assert not any(rule.input_channels for rule in program.rules.values())


def test_an_engine_pads_what_is_not_in_its_own_buffer() -> None:
    module = Lambda(lambda m, x: m.first(x).relu(), first=conv(3, 8)).eval()
    program, x = lowered(module, images(3)), images(3)
    program.take_weights(WeightStore(), module, channels_last=True)
    engine = Fused().load(Fused().build(program, FP32, CPU), CPU)
    buffer = engine.input_buffer(0, x)
    assert buffer.stride() == (4 * 36, 1, 4 * 6, 4)
    assert torch.equal(buffer, x)
    assert torch.equal(engine(x)[0], engine(buffer)[0])
    buffer.copy_(images(3) * 2)
    assert torch.equal(engine(x * 2)[0], engine(buffer)[0])


def test_depthwise_weights_have_their_channels_innermost_by_rule() -> None:
    module, x = block(lambda m, x: m.grouped(m.depthwise(x)).relu()), images()
    program = lowered(module, x)
    (rule,) = [rule for rule in program.rules.values() if rule.channels_innermost]
    weight = rule.compute(dict(module.named_parameters()))
    assert rule.sources == ("depthwise.weight",)
    assert weight.stride() == (1, 72, 24, 8)
    assert torch.equal(weight, module.depthwise.weight)
    check(program, module, x)


@pytest.mark.parametrize(
    ("layer", "taken"),
    [
        (nn.Conv2d(3, 8, 4, 4), True),
        (nn.Conv2d(3, 8, (2, 4), (2, 4), bias=False), True),
        (nn.Conv2d(3, 8, 5, 5), False),  # 12 pixels are not fives
        (nn.Conv2d(3, 8, 4, 2), False),
        (nn.Conv2d(3, 8, 4, 4, padding=2), False),
        (nn.Conv2d(3, 6, 4, 4, groups=3), False),
        (nn.Conv2d(3, 8, 2, 2, dilation=2), False),
        (nn.Conv2d(3, 8, (4, 5), (4, 5)), False),
    ],
)
def test_patches_are_one_matrix_product(layer: nn.Conv2d, taken: bool) -> None:
    module, x = nn.Sequential(layer, nn.Tanh()).eval(), images(3, 12)
    program = lowered(module, x)
    assert operators(program)["linear"] == taken
    check(program, module, x)


# --- pools, no-ops ---


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: functional.max_pool2d(x, 3, 2, 1),
        lambda m, x: functional.max_pool2d(x, 2),
        lambda m, x: functional.max_pool2d(x, (2, 3), (1, 2), (0, 1), (2, 1)),
        lambda m, x: functional.max_pool2d(x, 3, 2, ceil_mode=True),
    ],
)
def test_max_pooling_is_ours(function: Callable[..., Any]) -> None:
    module, x = Lambda(function).eval(), images()
    program = lowered(module, x)
    assert operators(program) == {"torchaccel.max_pool2d": 1}
    check(program, module, x)


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: functional.max_pool2d(x[0], 3, 2, 1),
        lambda m, x: functional.max_pool2d(x, 3, 2, 1, return_indices=True)[0],
        lambda m, x: functional.max_pool2d((x * 9).long(), 3, 2, 1),
    ],
)
def test_other_max_pooling_is_not(function: Callable[..., Any]) -> None:
    module, x = Lambda(function).eval(), images()
    program = lowered(module, x)
    assert "torchaccel.max_pool2d" not in operators(program)
    check(program, module, x)


@pytest.mark.parametrize(
    ("function", "ours"),
    [
        (lambda m, x: functional.adaptive_avg_pool2d(m.a(x).relu(), 1), True),
        (lambda m, x: m.a(x).relu().mean((2, 3)), True),
        (lambda m, x: m.a(x).relu().mean((-1, -2), keepdim=True), True),
        (lambda m, x: functional.adaptive_avg_pool2d(m.a(x).relu(), 2), False),
        (lambda m, x: m.a(x).relu().mean((1, 2)), False),
        (lambda m, x: torch.mean(m.a(x).relu(), None), False),
        (lambda m, x: m.a(x).relu().mean((2, 3), dtype=torch.float64), False),
        (lambda m, x: x.tanh().mean((2, 3)), False),  # Inductor merges the two
    ],
)
def test_means_over_pixels_behind_an_operator_of_ours_are_too(function: Callable[..., Any], ours: bool) -> None:
    module, x = block(function), images()
    program = lowered(module, x)
    assert operators(program)["torchaccel.mean_pixels"] == ours
    check(program, module, x)


def test_dropout_and_casts_to_the_same_dtype_are_dropped() -> None:
    module = Lambda(lambda m, x: functional.dropout(x * 2, 0.5, m.training).to(torch.float32) + 1).eval()
    x = images()
    program = lowered(module, x)
    assert operators(program) == {"mul": 1, "add": 1}
    check(program, module, x)


def copied(m: Any, x: torch.Tensor, **options: Any) -> torch.Tensor:
    y = m.a(x)
    z = y.to(y.dtype, **options)
    z.sub_(1)
    return z * y


def dropped(m: Any, x: torch.Tensor) -> torch.Tensor:
    y = m.a(x)
    seen = y.view(2, -1)
    return functional.dropout(y, 0.5, m.training).relu_().flatten(1) * 2 + seen


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (m.a(x) * 3).to(torch.int32).to(torch.float32),
        lambda m, x: copied(m, x, copy=True),
        lambda m, x: copied(m, x, memory_format=torch.channels_last),
        lambda m, x: (m.a(x), x.detach()),
    ],
)
def test_a_cast_that_changes_something_or_copies_is_not_dropped(function: Callable[..., Any]) -> None:
    module, x = block(function), images()
    program = lowered(module, x)
    assert operators(program)["to"] + operators(program)["detach"] >= 1
    check(program, module, x)


def test_what_is_written_behind_a_dropout_is_seen_by_a_view_from_before_it() -> None:
    module, x = block(dropped), images()
    check(lowered(module, x), module, x)


def test_a_view_of_what_is_channels_last_now_is_copied() -> None:
    module, x = block(lambda m, x: m.a(x).relu().view(2, -1)), images()
    check(lowered(module, x), module, x)


# --- together ---


class FunctionalBlock(nn.Module):
    """A residual block with a stem, without a class for any of its parts."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.one = nn.Parameter(torch.randn(8, 3, 7, 7)), nn.Parameter(torch.randn(8, 8, 3, 3))
        self.scale, self.shift = nn.Parameter(torch.rand(8)), nn.Parameter(torch.randn(8))
        self.register_buffer("mean", torch.randn(8))
        self.register_buffer("variance", torch.rand(8) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        statistics = self.mean, self.variance, self.scale, self.shift
        x = functional.batch_norm(functional.conv2d(x, self.stem, stride=2, padding=3), *statistics)
        x = functional.max_pool2d(torch.relu(x), 3, 2, 1)
        y = functional.conv2d(x, self.one, self.shift, padding=1)
        return torch.relu(y + x).mean((2, 3))


def test_a_functional_network_is_rewritten_like_one_of_modules() -> None:
    torch.manual_seed(0)
    module, x = FunctionalBlock().eval(), images(3, 32)
    program = lowered(module, x)
    assert operators(program) == {
        "torchaccel.conv_bias_act": 2,
        "torchaccel.max_pool2d": 1,
        "torchaccel.mean_pixels": 1,
    }
    check(program, module, x)


def test_resnet18_keeps_one_operator_of_pytorch() -> None:
    from torchvision.models import resnet18

    torch.manual_seed(0)
    module, x = settled(resnet18()), images(3, 64)
    program = lowered(module, x)
    assert operators(program)["torchaccel.conv_bias_act"] == 20
    assert sorted(activations(program)) == sorted(["relu"] * 9 + ["+relu"] * 8 + ["none"] * 3)
    check(program, module, x)


@pytest.mark.parametrize("left_out", PASSES, ids=lambda run: run.__name__)
def test_every_pass_can_be_left_out(left_out: Any) -> None:
    torch.manual_seed(0)
    module, x = FunctionalBlock().eval(), images(3, 32)
    program = lowered(module, x, run=[run for run in PASSES if run is not left_out])
    check(program, module, x)


def test_a_dynamic_batch_is_rewritten_too() -> None:
    module = block(lambda m, x: functional.max_pool2d((m.a(x) + m.b(x)).relu(), 2).mean((2, 3)))
    program = lowered(module, images(), dynamic_batch=(1, 2, 8))
    assert activations(program) == ["none", "+relu"]
    check(program, module, images(batch=5))


@pytest.mark.skipif(bool(Inductor().unavailable()), reason=str(Inductor().unavailable()))
def test_inductor_takes_our_operators_as_they_are() -> None:
    module = block(lambda m, x: functional.gelu(m.a(x).relu() * 2 + x).mean((2, 3)))
    x = images()
    program = lowered(module, x)
    program.take_weights(WeightStore(), module, channels_last=True)
    backend = Fused(routes=("inductor",))
    plan = backend.build(program, FP32, CPU)
    engine = backend.load(plan, CPU)
    assert plan.manifest["route"] == "inductor"
    with torch.no_grad():
        assert relative_error(engine(x)[0], module(x)) < 1e-6
