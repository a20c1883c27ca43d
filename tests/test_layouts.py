"""Programs are traced on contiguous tensors and served in channels-last: views, and writes through them, in both."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import torchaccel
from tests.helpers import Lambda, captured, relative_error
from torchaccel.layouts import settle_layouts

CHANNELS_LAST = torch.channels_last


def net(function: Callable[..., Any]) -> nn.Module:
    torch.manual_seed(0)
    return Lambda(function, conv=nn.Conv2d(4, 6, 3), linear=nn.Linear(96, 5), drop=nn.Dropout(inplace=True)).eval()


def images() -> torch.Tensor:
    return torch.randn(2, 4, 6, 6, generator=torch.Generator().manual_seed(1))


def targets(function: Callable[..., Any]) -> list[str]:
    """The operators of a settled program."""
    program = captured(net(function), images())
    settle_layouts(program.exported)
    program.exported.graph.lint()
    nodes = [node for node in program.exported.graph.nodes if node.op == "call_function"]
    return [str(node.target).removeprefix("aten.") for node in nodes]


def written(value: torch.Tensor) -> torch.Tensor:
    value[:, 0] = 0.0
    return value


VIEWS: dict[str, Callable[..., Any]] = {
    "of a result": lambda m, x: m.linear(m.conv(x).view(-1, 96)),
    "of an input": lambda m, x: m.linear(x.view(-1, 96)[:2]) + m.conv(x).mean(),
    "of a weight": lambda m, x: functional.conv2d(x, m.conv.weight * m.conv.weight.view(6, -1).sum(1).view(6, 1, 1, 1)),
    "in another's form": lambda m, x: m.conv(x).view_as(torch.empty(2, 96)),
    "of what was written before": lambda m, x: m.linear(functional.leaky_relu_(m.conv(x)).view(-1, 96)),
    "beside another's write": lambda m, x: written(m.linear(m.conv(x).view(-1, 96))),
    "of a part": lambda m, x: m.conv(x).split(3, 1)[1].view(-1, 48),
    "dropped out of": lambda m, x: m.linear(m.drop(m.conv(x).view(-1, 96))),
}
WRITES: dict[str, Callable[..., Any]] = {
    "view": lambda m, x: (y := m.conv(x), y.view(2, -1).mul_(2.0))[0],
    "reshape": lambda m, x: (y := m.conv(x), y.reshape(2, -1).mul_(2.0))[0],
    "flatten": lambda m, x: (y := m.conv(x), functional.relu_(y.flatten(1)))[0],
    "what no longer is a copy": lambda m, x: (y := m.conv(x), y.permute(0, 2, 3, 1).contiguous().mul_(2.0))[0],
    "the viewed": lambda m, x: (y := m.conv(x), y.flatten(1), y.relu_())[1],
    "a part": lambda m, x: (y := m.conv(x), y.split(3, 1)[0].reshape(-1)[:7].mul_(2.0))[0],
    "a cast to another layout": lambda m, x: (y := m.conv(x), y.float(memory_format=CHANNELS_LAST).mul_(2.0))[0],
    "a copy in another layout": lambda m, x: (y := m.conv(x), y.to(memory_format=CHANNELS_LAST).mul_(2.0))[0],
    "a result returned twice": lambda m, x: ((y := m.conv(x)), written(y.view(2, -1)), y),
}
SAME: dict[str, Callable[..., Any]] = {  # what returns its own input
    "type_as": lambda m, y: y.type_as(m.conv.weight),
    "dropout": lambda m, y: functional.dropout(y, 0.5, m.training),
    "dropout2d": lambda m, y: functional.dropout2d(y, 0.5, m.training),
    "alpha_dropout": lambda m, y: functional.alpha_dropout(y, 0.5, m.training),
    "feature_alpha_dropout": lambda m, y: functional.feature_alpha_dropout(y, 0.5, m.training),
}
WRITES |= {
    name: lambda m, x, same=same: (y := m.conv(x), y.view(2, -1), same(m, y).mul_(2.0))[1]
    for name, same in SAME.items()
}
BY_STRIDES: dict[str, Callable[..., Any]] = {
    "as_strided": lambda m, x: m.conv(x).as_strided((2, 3), (96, 5)),
    "as_strided of an input": lambda m, x: (x.as_strided((2, 3), (144, 5)), m.conv(x)),
    "complex": lambda m, x: torch.view_as_complex(m.conv(x).view(2, 6, 4, 2, 2)).abs(),
    "bits": lambda m, x: m.conv(x).sign().view(torch.int16),
}


@pytest.mark.parametrize("backend", ["eager", "fused"])
@pytest.mark.parametrize("name", [*VIEWS, *WRITES, *BY_STRIDES])
def test_views_and_writes_through_them_are_served_in_channels_last(name: str, backend: str) -> None:
    module, x = net((VIEWS | WRITES | BY_STRIDES)[name]), images()
    model = torchaccel.compile(module, "fp32", backend=backend, device="cpu", cache_dir=False)
    with torch.inference_mode():
        found, wanted = model(x), module(x)
    pairs = zip(found, wanted, strict=True) if isinstance(wanted, tuple) else [(found, wanted)]
    for one, other in pairs:
        assert relative_error(one, other) < 1e-6


@pytest.mark.parametrize("name", VIEWS)
def test_a_view_that_nothing_writes_through_may_copy_and_nothing_is_pinned(name: str) -> None:
    found = targets(VIEWS[name])
    assert not {"view.default", "view_as.default", "contiguous.default"} & set(found)


@pytest.mark.parametrize("name", [name for name in WRITES if name != "what no longer is a copy"])
def test_what_is_written_through_a_view_is_pinned_once(name: str) -> None:
    assert targets(WRITES[name]).count("contiguous.default") == 1


@pytest.mark.parametrize("name", ["of what was written before", "beside another's write"])
def test_views_are_served_with_a_dynamic_batch(name: str) -> None:
    module, x = net(VIEWS[name]), images()
    model = torchaccel.compile(module, "fp32", backend="fused", device="cpu", dynamic_batch=(1, 2, 4), cache_dir=False)
    with torch.inference_mode():
        assert relative_error(model(x[:1]), module(x[:1])) < 1e-6
