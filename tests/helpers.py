"""What the CPU tests share."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import torchaccel
from torchaccel.capture import Program, capture
from torchaccel.compiled import CompiledModule
from torchaccel.compiler import BACKENDS
from torchaccel.precision import PRECISIONS
from torchaccel.signature import read_call


def on_cpu(module: nn.Module, precision: str = "fp32", backend: str = "eager", **options: Any) -> CompiledModule:
    """The module compiled for the CPU, by PyTorch's own kernels unless said otherwise."""
    return torchaccel.compile(module, precision, backend=backend, device="cpu", **options)


def captured(module: nn.Module, *args: Any, precision: str = "fp32", **options: Any) -> Program:
    """The program of a module for a call with `args`."""
    call = read_call(args, {})
    return capture(module, call, call.tensors, PRECISIONS[precision], **options)


def relative_error(y: torch.Tensor, r: torch.Tensor) -> float:
    """‖y−r‖/‖r‖ in float64."""
    return ((y.double() - r.double()).norm() / r.double().norm()).item()


def images(batch: int = 2) -> torch.Tensor:
    """A batch for a `SmallConvNet`."""
    return torch.randn(batch, 3, 8, 8)


def assert_fresh(model: CompiledModule, x: torch.Tensor, builds: int, refreshes: int) -> None:
    """The model serves what the module computes now, from an engine, after so many builds and refreshes."""
    with torch.no_grad():
        by_module = model.report().calls_by_module
        assert relative_error(model(x), model.module(x)) < 2e-6
    report = model.report()
    assert report.calls_by_module == by_module
    assert (report.builds, report.refreshes) == (builds, refreshes)


@torch.no_grad()
def in_place(model: CompiledModule) -> None:
    """Change a weight of a compiled `SmallConvNet`, as PyTorch tracks it."""
    model.module.fc.weight.mul_(-2)


def state_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of every value of a module."""
    return copy.deepcopy(module.state_dict())


def same_values(module: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    """Whether a module holds exactly these values, bit for bit."""
    now = module.state_dict()
    return list(now) == list(state) and all(
        now[name].dtype == state[name].dtype and torch.equal(now[name], state[name]) for name in state
    )


@contextmanager
def without_compiler() -> Iterator[None]:
    """Take Inductor's C++ compiler away after torchaccel has found it: a build that really fails."""
    if reason := BACKENDS["inductor"].unavailable():
        pytest.skip(reason)
    from torch._inductor import config

    with config.patch({"cpp.cxx": ("/nowhere/compiler",), "force_disable_caches": True}):
        yield


class Lambda(nn.Module):
    """A module that calls a function; its submodules are given by keyword."""

    def __init__(self, function: Callable[..., Any], **children: nn.Module) -> None:
        super().__init__()
        for name, child in children.items():
            self.add_module(name, child)
        self.function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.function(self, *args, **kwargs)


def settled(module: nn.Module) -> nn.Module:
    """The module in eval mode, its BatchNorm statistics and affine parameters away from 0 and 1."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for child in module.modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                for tensor in (child.running_mean, child.bias):
                    if tensor is not None:
                        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
                for tensor in (child.running_var, child.weight):
                    if tensor is not None:
                        tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
    return module.eval()
