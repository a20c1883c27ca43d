"""The prepared copy, and the folding of BatchNorm in the captured program."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.helpers import Lambda, captured, on_cpu, relative_error, run_program, same_values, settled, state_of
from tests.models import small_conv_net
from torchaccel.errors import BuildError
from torchaccel.prepare import prepare
from torchaccel.weights import WeightStore

# --- the copy ---


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("mode", [True, False], ids=["train", "eval"])
def test_the_caller_s_module_is_not_touched(dtype: torch.dtype, mode: bool) -> None:
    module = small_conv_net().train(mode)
    module.fc.weight.requires_grad_(False)
    module.norm.weight.grad = torch.ones(8)
    calls: list[int] = []
    module.fc.register_forward_hook(lambda *_: calls.append(1))
    module.register_forward_hook(lambda *_: calls.append(2))
    state, objects = state_of(module), list(module.parameters())
    prepared = prepare(module, dtype, ["fc"])
    with torch.no_grad():
        prepared(torch.randn(2, 3, 8, 8).to(dtype))
        for parameter in prepared.parameters():
            parameter.zero_()
        for buffer in prepared.buffers():
            buffer.zero_()
    assert same_values(module, state)
    assert all(a is b for a, b in zip(module.parameters(), objects, strict=True))
    assert module.training is mode
    assert [parameter.requires_grad for parameter in module.parameters()].count(False) == 1
    assert module.norm.weight.grad is not None
    assert len(module._forward_hooks) == len(module.fc._forward_hooks) == 1
    assert calls == [1], "the hook of a submodule is a part of the model, and the root's is the compiled module's"


def test_the_copy_is_in_eval_mode_cast_and_free_of_autograd() -> None:
    prepared = prepare(small_conv_net().train(), torch.float16)
    assert not any(child.training for child in prepared.modules())
    assert {parameter.dtype for parameter in prepared.parameters()} == {torch.float16}
    assert not any(parameter.requires_grad for parameter in prepared.parameters())
    assert prepared.norm.running_mean.dtype is torch.float16
    assert prepared.norm.num_batches_tracked.dtype is torch.int64


def test_a_hook_on_the_root_stays_the_root_s_own_business() -> None:
    module = nn.Linear(2, 2)
    module.register_forward_pre_hook(lambda *_: pytest.fail("called"))
    module.register_forward_hook(lambda *_: pytest.fail("called"))
    prepare(module, torch.float32)(torch.zeros(1, 2))
    assert (len(module._forward_pre_hooks), len(module._forward_hooks)) == (1, 1)


def test_tied_weights_stay_tied() -> None:
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    module[1].weight = module[0].weight
    prepared = prepare(module, torch.float16)
    assert prepared[0].weight is prepared[1].weight
    program = captured(module, torch.randn(2, 4), precision="fp16")
    store = WeightStore()
    program.take_weights(store, module)
    assert store.size_bytes() == 2 * (16 + 4 + 4)


def test_keep_fp32_computes_those_submodules_in_fp32_and_hands_on_the_compute_dtype() -> None:
    seen: dict[str, Any] = {}
    module = small_conv_net()
    for name in ("first", "second", "fc"):
        module.get_submodule(name).register_forward_hook(
            lambda _, args, result, name=name: seen.update({name: (args[0].dtype, result.dtype)})
        )
    prepared = prepare(module, torch.float16, ["second", "fc"])
    result = prepared(torch.randn(2, 3, 8, 8).half())
    half, single = torch.float16, torch.float32
    assert seen == {"first": (half, half), "second": (single, single), "fc": (single, single)}
    assert result.dtype is half
    assert {name: tensor.dtype for name, tensor in prepared.named_parameters() if "weight" in name} == {
        "first.weight": half, "norm.weight": half, "second.weight": single, "second_norm.weight": half,
        "fc.weight": single,
    }  # fmt: skip


def test_keep_fp32_of_nested_names_has_one_border_and_covers_what_is_inside() -> None:
    inner = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), nn.ReLU()))
    module = nn.ModuleDict({"block": inner, "blocks": nn.Linear(4, 4)})
    holder = Lambda(lambda self, x: self.all["blocks"](self.all["block"](x)), all=module)
    prepared = prepare(holder, torch.float16, ["all.block.1", "all.block"])
    dtypes = {name: tensor.dtype for name, tensor in prepared.named_parameters()}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("all.block.")} == {torch.float32}
    assert {dtype for name, dtype in dtypes.items() if name.startswith("all.blocks.")} == {torch.float16}
    assert prepared(torch.randn(2, 4).half()).dtype is torch.float16
    assert len(prepared.get_submodule("all.block")._forward_hooks) == 1
    assert len(prepared.get_submodule("all.block.1")._forward_hooks) == 0


def test_keep_fp32_casts_keyword_arguments_and_nested_results() -> None:
    inner = Lambda(lambda self, x, *, extra: {"sum": x + extra["y"], "rows": (x, torch.arange(2))})
    module = Lambda(lambda self, x: self.inner(x, extra={"y": x}), inner=inner)
    result = prepare(module, torch.bfloat16, ["inner"])(torch.ones(2, dtype=torch.bfloat16))
    assert (result["sum"].dtype, result["rows"][0].dtype) == (torch.bfloat16, torch.bfloat16)
    assert result["rows"][1].dtype is torch.int64


def test_keep_fp32_casts_what_a_dataclass_holds() -> None:
    @dataclass
    class Held:
        x: torch.Tensor

    inner = Lambda(lambda self, held: Held(self.fc(held.x)), fc=nn.Linear(2, 2))
    module = Lambda(lambda self, x: self.inner(Held(x)).x, inner=inner)
    assert prepare(module, torch.bfloat16, ["inner"])(torch.ones(2, dtype=torch.bfloat16)).dtype is torch.bfloat16


def test_keep_fp32_makes_what_it_keeps_more_exact() -> None:
    torch.manual_seed(0)
    module = settled(nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 8)))
    x = torch.randn(16, 64)
    with torch.no_grad():
        expected = module(x)
        plain = relative_error(on_cpu(module, "bf16")(x), expected)
        kept = relative_error(on_cpu(module, "bf16", keep_fp32=["0", "2"])(x), expected)
    assert kept < plain


def test_a_tied_weight_may_be_kept_in_fp32_at_one_of_its_places() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 4))
    module[2].weight = module[0].weight
    x = torch.randn(3, 4)
    for kept in ("0", "2"):
        with torch.no_grad():
            assert relative_error(on_cpu(module, "bf16", keep_fp32=[kept])(x), module(x)) < 5e-2


def test_a_module_that_cannot_be_copied_is_a_build_error_that_says_what_it_holds() -> None:
    module = nn.Linear(2, 2)
    module.lock = threading.Lock()
    with torch.no_grad(), pytest.raises(BuildError, match="lock"):
        on_cpu(module)(torch.ones(1, 2))


# --- folding ---


def norm2d(channels: int, **options: Any) -> nn.Module:
    return nn.BatchNorm2d(channels, **options)


def conv(**options: Any) -> nn.Conv2d:
    return nn.Conv2d(**{"in_channels": 4, "out_channels": 8, "kernel_size": 3, **options})


def twice(self: Any, x: torch.Tensor) -> torch.Tensor:
    return self.norm(self.conv(self.norm(self.conv(x))))


def shared_convs() -> nn.Module:
    module = Lambda(
        lambda self, x: self.n1(self.c1(x)) + self.n2(self.c2(x)), c1=conv(), c2=conv(), n1=norm2d(8), n2=norm2d(8)
    )
    module.c2.weight = module.c1.weight
    return module


def shared_bias() -> nn.Module:
    module = Lambda(
        lambda self, x: self.n1(self.c1(x)) + self.n2(self.c2(x)), c1=conv(), c2=conv(), n1=norm2d(8), n2=norm2d(8)
    )
    module.c2.bias = module.c1.bias
    return module


def tied_affine() -> nn.Module:
    module = nn.Sequential(conv(), norm2d(8))
    module[1].bias = module[1].weight
    return module


def weight_normed() -> nn.Module:
    return nn.Sequential(nn.utils.parametrizations.weight_norm(conv()), norm2d(8))


def in_place_between() -> nn.Module:
    return Lambda(lambda self, x: self.norm(self.conv(x).add_(1.0)), conv=conv(), norm=norm2d(8))


class Functional(nn.Module):
    """Without a BatchNorm module: parameters and buffers of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.randn(8, 4, 3, 3))
        self.g, self.b = nn.Parameter(torch.rand(8) + 0.5), nn.Parameter(torch.randn(8))
        self.register_buffer("m", torch.randn(8))
        self.register_buffer("v", torch.rand(8) + 0.5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(F.batch_norm(F.conv2d(x, self.w, stride=2), self.m, self.v, self.g, self.b, eps=0.1))


SHAPE = (2, 4, 8, 8)
FOLDING: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...], int]] = {
    "functional": (Functional, SHAPE, 1),
    "nested": (lambda: nn.Sequential(nn.Sequential(conv()), nn.Sequential(norm2d(8), nn.ReLU())), SHAPE, 1),
    "without bias": (lambda: nn.Sequential(conv(bias=False), norm2d(8)), SHAPE, 1),
    "without affine": (lambda: nn.Sequential(conv(), norm2d(8, affine=False)), SHAPE, 1),
    "without bias or affine": (lambda: nn.Sequential(conv(bias=False), norm2d(8, affine=False)), SHAPE, 1),
    "a large epsilon": (lambda: nn.Sequential(conv(), norm2d(8, eps=0.5)), SHAPE, 1),
    "grouped": (lambda: nn.Sequential(conv(groups=2), norm2d(8)), SHAPE, 1),
    "depthwise": (lambda: nn.Sequential(conv(groups=4), norm2d(8)), SHAPE, 1),
    "dilated, strided, padded": (lambda: nn.Sequential(conv(dilation=2, stride=2, padding=1), norm2d(8)), SHAPE, 1),
    "1-d": (lambda: nn.Sequential(nn.Conv1d(4, 8, 3), nn.BatchNorm1d(8)), (2, 4, 9), 1),
    "3-d": (lambda: nn.Sequential(nn.Conv3d(4, 8, 2), nn.BatchNorm3d(8)), (2, 4, 5, 5, 5), 1),
    "a convolution used twice": (
        lambda: Lambda(twice, conv=conv(in_channels=8, padding=1), norm=norm2d(8)), (2, 8, 6, 6), 0),
    "a shared weight": (shared_convs, SHAPE, 0),
    "a shared bias": (shared_bias, SHAPE, 2),
    "one BatchNorm for two convolutions": (
        lambda: Lambda(lambda self, x: self.n(self.a(x)) + self.n(self.b(x)), a=conv(), b=conv(), n=norm2d(8)),
        SHAPE, 2),
    "one BatchNorm for two convolutions without bias": (
        lambda: Lambda(lambda self, x: self.n(self.a(x)) + self.n(self.b(x)), a=conv(bias=False), b=conv(bias=False),
                       n=norm2d(8)), SHAPE, None),
    "a convolution that something else reads too": (
        lambda: Lambda(lambda self, x: self.norm(y := self.conv(x)) + y, conv=conv(), norm=norm2d(8)), SHAPE, 0),
    "two BatchNorms on one convolution": (
        lambda: Lambda(lambda self, x: self.a(y := self.conv(x)) * self.b(y), conv=conv(), a=norm2d(8), b=norm2d(8)),
        SHAPE, 0),
    "a BatchNorm after a BatchNorm": (lambda: nn.Sequential(conv(), norm2d(8), norm2d(8)), SHAPE, None),
    "a BatchNorm after a BatchNorm, without bias": (
        lambda: nn.Sequential(conv(bias=False), norm2d(8), norm2d(8, affine=False)), SHAPE, None),
    "ReLU between": (lambda: nn.Sequential(conv(), nn.ReLU(), norm2d(8)), SHAPE, 0),
    "an addition in place between": (in_place_between, SHAPE, 0),
    "BatchNorm first": (lambda: nn.Sequential(norm2d(4), conv()), SHAPE, 0),
    "a linear layer": (lambda: nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8)), (5, 4), 0),
    "a transposed convolution": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 8, 3), norm2d(8)), SHAPE, 0),
    "batch statistics": (lambda: nn.Sequential(conv(), norm2d(8, track_running_stats=False)), SHAPE, 0),
    "padding='same'": (lambda: nn.Sequential(conv(padding="same"), norm2d(8)), SHAPE, None),
    "reflecting": (lambda: nn.Sequential(conv(padding=1, padding_mode="reflect"), norm2d(8)), SHAPE, 1),
    "a weight that is computed": (weight_normed, SHAPE, 0),
    "γ and β one tensor": (tied_affine, SHAPE, 1),
    "GroupNorm": (lambda: nn.Sequential(conv(), nn.GroupNorm(2, 8)), SHAPE, 0),
    "BatchNorm and more": (
        lambda: nn.Sequential(conv(), norm2d(8), nn.SiLU(), conv(in_channels=8), norm2d(8)), SHAPE, 2),
}  # fmt: skip


def folding(name: str) -> tuple[nn.Module, torch.Tensor, int | None]:
    torch.manual_seed(0)
    make, shape, folded = FOLDING[name]
    return settled(make()), torch.randn(shape), folded


@pytest.mark.parametrize("name", FOLDING)
def test_folding_is_exact_up_to_rounding_and_happens_where_it_may(name: str) -> None:
    module, x, folded = folding(name)
    with torch.no_grad():
        expected = module(x)
    program = captured(module, x)
    assert relative_error(run_program(program, module, x), expected) < 2e-6
    if folded is not None:
        assert program.folded == folded


@pytest.mark.parametrize("name", FOLDING)
def test_new_weights_fold_the_same_way(name: str) -> None:
    module, x, _ = folding(name)
    store = WeightStore()
    program = captured(module, x)
    program.take_weights(store, module)
    with torch.no_grad():
        for tensor in (*module.parameters(), *module.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.25).add_(0.01)
        store.refresh(module)
        (result,) = program.exported.module(check_guards=False)(x)
        assert relative_error(result, module(x)) < 2e-6


def test_folded_statistics_are_no_input_of_the_program_any_more() -> None:
    module = small_conv_net()
    program = captured(module, torch.randn(2, 3, 8, 8))
    names = set(program.rules)
    assert names == set(map(str, program.exported.graph_signature.inputs_to_parameters.values())) | set(
        map(str, program.exported.graph_signature.inputs_to_buffers.values())
    )
    assert len(names) == 6, "a weight and a bias for each convolution, and the linear layer's two"
    assert not any("num_batches_tracked" in name or "running" in name for name in names - {"module.norm.running_mean"})


def test_half_precision_folds_in_fp32_before_it_rounds() -> None:
    torch.manual_seed(0)
    module = settled(nn.Sequential(conv(), norm2d(8)))
    with torch.no_grad():
        module[1].running_var.mul_(1e-6)
        module[1].weight.mul_(1e-3)
    x = torch.randn(SHAPE)
    program = captured(module, x, precision="fp16")
    assert program.folded == 1
    with torch.no_grad():
        assert relative_error(run_program(program, module, x.half()), module(x)) < 1e-3


def test_a_border_of_precision_between_convolution_and_batch_norm_is_not_folded_away() -> None:
    torch.manual_seed(0)
    module = settled(nn.Sequential(conv(), norm2d(8)))
    x = torch.randn(SHAPE)
    for kept in ("0", "1"):
        program = captured(module, x, precision="bf16", keep_fp32=[kept])
        assert program.folded == 0
        with torch.no_grad():
            assert relative_error(run_program(program, module, x.bfloat16()), module(x)) < 2e-2
