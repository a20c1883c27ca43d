"""What the CPU tests share."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn

import torchaccel
from torchaccel.backends.base import Backend, Plan
from torchaccel.capture import capture
from torchaccel.compiled import CompiledModule
from torchaccel.compiler import BACKENDS
from torchaccel.precision import PRECISIONS
from torchaccel.program import Program
from torchaccel.signature import flatten, read_call
from torchaccel.weights import WeightRule, WeightStore, module_tensors


def on_cpu(module: nn.Module, precision: str = "fp32", backend: str = "eager", **options: Any) -> CompiledModule:
    """The module compiled for the CPU, by PyTorch's own kernels unless said otherwise."""
    return torchaccel.compile(module, precision, backend=backend, device="cpu", **options)


def captured(module: nn.Module, *args: Any, precision: str = "fp32", **options: Any) -> Program:
    """The program of a module for a call with `args`."""
    call = read_call(args, {})
    return capture(module, call, call.tensors, PRECISIONS[precision], **options)


def build_plan(backend: Backend, module: nn.Module, *args: Any, precision: str = "fp16", **options: Any) -> Plan:
    """The plan of a module by a TensorRT backend, which needs no GPU for it."""
    program = lowered_program(backend, module, *args, precision=precision, **options)
    return backend.build(program, PRECISIONS[precision], torch.device("cuda", 0))


def lowered_program(
    backend: Backend, module: nn.Module, *args: Any, precision: str = "fp16", **options: Any
) -> Program:
    """The program of a module as a backend builds from it, with the module's weights."""
    program = captured(module, *args, precision=precision, **options)
    backend.lower(program)
    program.take_weights(WeightStore(), module)
    return program


def run_program(program: Program, module: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """The only output of a program on the module's weights."""
    program.take_weights(WeightStore(), module)
    with torch.no_grad():
        (result,) = program.exported.module(check_guards=False)(x)
    return result


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


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two tensors are the same to the bit: dtype, shape and layout, NaN and the sign of zero included."""
    if (a.dtype, a.shape, a.stride()) != (b.dtype, b.shape, b.stride()):
        return False
    raw = [tensor.detach().contiguous().reshape(-1).view(torch.uint8) for tensor in (a, b)]
    return torch.equal(*raw)


def engine_weights(model: CompiledModule) -> dict[WeightRule, torch.Tensor]:
    """What the PyTorch-native engines compute with, by rule: the tensors in their own graphs, not the store's."""
    held = {}
    for built in model._state.built.values():
        run = getattr(built.engine._run, "_orig_mod", built.engine._run)
        tensors = module_tensors(run)
        held.update({rule: tensors[name] for name, rule in built.plan.payload.rules.items()})
    return held


@torch.no_grad()
def assert_served_afresh(model: CompiledModule, *inputs: Any, fresh: CompiledModule | None = None) -> None:
    """An engine serves the call, with the weights and the outputs of an engine that is built now, to the bit.

    Closeness would not do: fp16 hides a change of 1e-6, and so does an input that does not reach the weight.
    """
    before = model.report()
    results, _ = flatten(model(*inputs))
    after = model.report()
    assert (after.calls_by_engine, after.calls_by_module) == (before.calls_by_engine + 1, before.calls_by_module)
    fresh = fresh or copy.deepcopy(model)
    expected, _ = flatten(fresh(*inputs))
    held, wanted = engine_weights(model), engine_weights(fresh)
    assert wanted
    for rule, tensor in wanted.items():
        assert rule in held, f"the engine has no weight of its own for {rule.sources}"
        assert same_bits(held[rule], tensor), f"{rule.function} of {rule.sources}"
    for rule in held.keys() - wanted.keys():  # two that have become one
        assert same_bits(held[rule], rule.compute(module_tensors(model.module))), f"{rule.function} of {rule.sources}"
    assert all(same_bits(result, other) for result, other in zip(results, expected, strict=True))


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
