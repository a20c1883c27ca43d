"""Shapes on the GPU: builds, captures, and the memory of the device and of the host stay bounded."""

import gc
from pathlib import Path

import pytest
import torch
from torch import nn

import torchaccel
from tests.gpu.helpers import need, relative_error, served_by_engine

SHAPES = 50


@pytest.fixture
def inputs() -> list[torch.Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)
    sizes = [(1 + index % 10, 1 + index // 10, 8) for index in range(SHAPES)]
    return [torch.randn(size, device="cuda", generator=generator) for size in sizes]


def make(max_runners: int) -> torchaccel.CompiledModule:
    need("eager", "fp32")
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 4)).cuda()
    return torchaccel.compile(module, "fp32", backend="eager", max_runners=max_runners)


def held_mib() -> dict[str, float]:
    """What is in use, once all is done: by PyTorch's allocator, on the device as a whole, and by the process."""
    torch.cuda.synchronize()
    gc.collect()
    free, total = torch.cuda.mem_get_info()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    used = {"allocator": torch.cuda.memory_reserved(), "device": total - free, "host": pages * 4096}
    return {name: count / 2**20 for name, count in used.items()}


def cycle(model: torchaccel.CompiledModule, inputs: list[torch.Tensor], times: int) -> None:
    with torch.inference_mode():
        for _ in range(times):
            for x in inputs:
                model(x)


def check(model: torchaccel.CompiledModule, inputs: list[torch.Tensor], kept: int) -> None:
    with torch.inference_mode():
        assert all(relative_error(model(x), model.module(x)) < 1e-5 for x in inputs)
    report = model.report()
    assert report.builds == SHAPES
    assert len(report.runners) == kept
    assert all(runner.graph for runner in report.runners)
    assert served_by_engine(model)


def test_ten_thousand_calls_of_fifty_shapes_hold_no_more_than_the_first_fifty(inputs: list[torch.Tensor]) -> None:
    model = make(max_runners=64)
    cycle(model, inputs, 1)
    captured = [model.runner_for(x) for x in inputs]
    before = held_mib()
    cycle(model, inputs, 10_000 // SHAPES - 1)
    after = held_mib()
    assert [model.runner_for(x) for x in inputs] == captured, "no shape was captured again"
    check(model, inputs, kept=SHAPES)
    assert after["allocator"] <= before["allocator"]
    assert after["device"] - before["device"] < 8, "other processes may use the device too"
    assert after["host"] - before["host"] < 16


def test_shapes_beyond_the_limit_are_captured_again_without_a_build_and_without_more_memory(
    inputs: list[torch.Tensor],
) -> None:
    model = make(max_runners=8)
    cycle(model, inputs, 1)
    last = model.runner_for(inputs[-1])
    before = held_mib()
    cycle(model, inputs, 2)
    assert model.runner_for(inputs[-1]) is not last
    after = held_mib()
    check(model, inputs, kept=8)
    for name in ("allocator", "device"):
        assert after[name] - before[name] < 32, f"{name}: 100 captures that were kept would hold 2 MiB each"
    assert after["host"] - before["host"] < 32
