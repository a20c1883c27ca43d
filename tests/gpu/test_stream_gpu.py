"""stream(): from the host to the host, in order, overlapped."""

from typing import Any

import numpy as np
import pytest
import torch

import torchaccel
from tests.gpu.helpers import need, relative_error
from tests.models import small_conv_net


@pytest.fixture
def served() -> tuple[torch.nn.Module, torchaccel.CompiledModule]:
    need("onnx_tensorrt")
    module = small_conv_net().cuda()
    return module, torchaccel.compile(module, "fp16", backend="onnx_tensorrt")


def batches(count: int = 8) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(4, 3, 32, 32, generator=generator) for _ in range(count)]


def check(module: torch.nn.Module, results: list[torch.Tensor], inputs: list[torch.Tensor]) -> None:
    assert len(results) == len(inputs)
    with torch.inference_mode():
        for result, x in zip(results, inputs, strict=True):
            assert not result.is_pinned()
            assert relative_error(result, module(x.cuda()).cpu()) < 1e-2


def test_results_come_in_order_and_stay(served: tuple) -> None:
    module, model = served
    inputs = [*batches(), batches()[0][:3]]  # a ragged last batch
    check(module, list(model.stream(inputs)), inputs)


def test_arrays_tuples_and_pinned_buffers_filled_anew(served: tuple) -> None:
    module, model = served
    inputs = batches()
    check(module, list(model.stream(x.numpy() for x in inputs)), inputs)
    check(module, list(model.stream((x,) for x in inputs)), inputs)
    buffer = torch.empty_like(inputs[0], pin_memory=True)
    check(module, list(model.stream(buffer.copy_(x) for x in inputs)), inputs)


@pytest.mark.parametrize("preprocess", [None, lambda x: x * 1.0], ids=["", "preprocess"])
@pytest.mark.parametrize("count", [1, 2])
def test_a_pinned_buffer_has_been_read_when_its_turn_comes_again(served: tuple, preprocess: Any, count: int) -> None:
    module, model = served
    inputs = batches()
    buffers = [torch.empty_like(inputs[0], pin_memory=True) for _ in range(count)]

    def source():
        for index, x in enumerate(inputs):
            buffer = buffers[index % count].copy_(x)
            torch.cuda._sleep(20_000_000)  # some 10 ms on the caller's stream, which copies wait for
            yield buffer

    check(module, list(model.stream(source(), preprocess, pinned_buffers=count)), inputs)


def test_preprocess_runs_on_the_device(served: tuple) -> None:
    module, model = served
    raw = [np.random.default_rng(seed).integers(0, 256, (4, 3, 32, 32), dtype=np.uint8) for seed in range(6)]

    def normalise(x: torch.Tensor) -> torch.Tensor:
        assert x.device.type == "cuda"
        assert x.dtype == torch.uint8
        return x.float() / 255 - 0.5

    check(module, list(model.stream(raw, normalise)), [torch.from_numpy(x).float() / 255 - 0.5 for x in raw])


def test_an_exception_comes_at_its_item_and_leaves_nothing_stuck(served: tuple) -> None:
    module, model = served
    inputs = batches(5)

    def source():
        yield from inputs[:4]
        raise ValueError("no more")

    results = []
    with pytest.raises(ValueError, match="no more"):
        for result in model.stream(source()):
            results.append(result)
    check(module, results, inputs[:4])
    check(module, list(model.stream(inputs)), inputs)


def test_at_most_three_batches_are_read_ahead(served: tuple) -> None:
    _, model = served
    read = 0

    def source():
        nonlocal read
        for x in batches():
            read += 1
            yield x

    results = model.stream(source())
    next(results)
    assert read <= 4
