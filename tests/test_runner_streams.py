"""Runners on several streams without a GPU: nothing is touched before its turn.

The engine is a stand-in here, and CUDA's streams are simulated (tests/simulated_cuda.py); tests/gpu/test_threads_gpu.py
has the real ones.
"""

from collections.abc import Callable, Iterator
from itertools import cycle
from typing import Any

import pytest
import torch

from tests.simulated_cuda import Race, SimulatedCuda, simulated_cuda
from torchaccel.backends.base import Engine
from torchaccel.pool import Pool
from torchaccel.runner import Runner
from torchaccel.signature import split_outputs

SHAPE = (2, 3)


class Sum(Engine):
    """Adds its inputs, with its result always in the same memory, as a CUDA graph has it."""

    def __init__(self, cuda: SimulatedCuda) -> None:
        self.result = cuda.empty(SHAPE, device=True)

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return (self.result.copy_(inputs[0] + inputs[1]),)


@pytest.fixture
def cuda() -> Iterator[SimulatedCuda]:
    with simulated_cuda() as simulated:
        yield simulated


@pytest.fixture
def runner(cuda: SimulatedCuda) -> Runner:
    examples = [cuda.empty(SHAPE, device=True) for _ in range(2)]
    outputs = split_outputs(torch.zeros(SHAPE), examples)[1]
    made = Runner(Sum(cuda), examples, [torch.float32], outputs, Pool(cuda.device), "", cuda_graph=False)
    made.compute(examples)  # as whoever makes one does, on the stream that it was made on
    return made


def filled(value: float) -> torch.Tensor:
    return torch.full(SHAPE, value)


def test_calls_on_several_streams_come_one_after_the_other(cuda: SimulatedCuda, runner: Runner) -> None:
    results = []
    for number, stream in zip(range(12), cycle([cuda.stream() for _ in range(3)])):
        torch.cuda.set_stream(stream)  # type: ignore[arg-type]
        given = [filled(float(number)).to(cuda.device), filled(1.0).to(cuda.device)]
        (result,) = runner(given)
        results.append((result + 1).clone())  # on the caller's stream, without waiting for it
        assert all(cuda.may_be_freed(tensor, stream) for tensor in (*given, result))
    assert not cuda.host
    for number, result in enumerate(results):
        assert torch.equal(result, filled(number + 2.0))


@pytest.mark.parametrize("pinned", [False, True])
@pytest.mark.parametrize("other", ["host", "device"])
def test_inputs_on_the_host_are_the_caller_s_again_after_the_call(
    pinned: bool, other: str, cuda: SimulatedCuda, runner: Runner
) -> None:
    buffer: Any = cuda.empty(SHAPE) if pinned else torch.zeros(SHAPE)
    one = filled(1.0).to(cuda.device) if other == "device" else filled(1.0)
    results = []
    for number in range(6):
        (result,) = runner([buffer.copy_(filled(float(number))), one])
        assert result.is_cuda == (other == "device")
        results.append(result)
    for number, result in enumerate(results):
        assert not result.is_pinned()
        assert torch.equal(result, filled(number + 1.0))


def test_what_the_gate_computes_takes_its_turn_too(cuda: SimulatedCuda, runner: Runner) -> None:
    ways: list[Callable[[Any], Any]] = [runner.check, runner.compute, runner, lambda _: runner.replay()]
    kept = []
    for number, way in enumerate(ways * 2):
        torch.cuda.set_stream(cuda.stream())  # type: ignore[arg-type]
        given = [filled(float(number)).to(cuda.device), filled(3.0).to(cuda.device)]
        kept += [(number + 3.0, result) for result in way(given) or ()]
    assert runner.record.calls == 2
    assert len(kept) == 6
    assert all(torch.equal(result, filled(value)) for value, result in kept)


@pytest.mark.parametrize("writer", ["the default stream", "a caller's"])
def test_weights_are_read_after_what_was_enqueued_on_the_streams_that_calls_came_from(
    writer: str, cuda: SimulatedCuda, runner: Runner
) -> None:
    one, other = cuda.stream(), cuda.stream()
    weight = filled(1.0).to(cuda.device)
    for stream in (one, other):
        stream.wait_stream(cuda.callers)
        torch.cuda.set_stream(stream)  # type: ignore[arg-type]
        runner.compute(runner.inputs)
    torch.cuda.set_stream(cuda.callers if writer == "the default stream" else one)  # type: ignore[arg-type]
    weight.copy_(filled(2.0).to(cuda.device))
    torch.cuda.set_stream(other)  # type: ignore[arg-type]
    with pytest.raises(Race):
        runner.pool.turn(weight.clone)

    def read() -> torch.Tensor:
        runner.pool.wait_for_callers()
        return weight.clone()

    assert torch.equal(runner.pool.turn(read), filled(2.0))
    assert not cuda.host
