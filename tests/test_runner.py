"""A runner without a GPU: static buffers, outputs of the caller's own, one turn at a time."""

import threading
import time
from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers import captured, images
from tests.models import small_conv_net
from torchaccel import BuildError
from torchaccel.backends.base import Engine, NativeEngine
from torchaccel.pool import Pool
from torchaccel.precision import PRECISIONS
from torchaccel.runner import Runner
from torchaccel.signature import split_outputs

CPU = torch.device("cpu")


class Doubles(Engine):
    """An engine that returns the same buffer every time, as a CUDA graph does."""

    channels_last = True

    def __init__(self) -> None:
        self.result: torch.Tensor | None = None
        self.seen: list[tuple[int, ...]] = []
        self.inside = 0

    def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        self.inside += 1
        assert self.inside == 1, "two calls at once"
        (x,) = inputs
        self.seen.append(x.stride())
        if self.result is None:
            self.result = torch.empty_like(x)
        time.sleep(0.001)
        torch.mul(x, 2, out=self.result)
        self.inside -= 1
        return (self.result,)


def make(engine: Engine, *examples: torch.Tensor, dtypes: Any = (torch.float32,), pool: Pool | None = None) -> Runner:
    _, spec = split_outputs(torch.zeros(1), [])
    return Runner(engine, examples, dtypes, spec, pool or Pool(CPU), "a signature")


def test_outputs_are_the_caller_s_own_and_later_calls_do_not_change_them() -> None:
    runner = make(Doubles(), torch.zeros(2, 3))
    first = runner([torch.ones(2, 3)])
    second = runner([torch.full((2, 3), 5.0)])
    assert torch.equal(first[0], torch.full((2, 3), 2.0))
    assert torch.equal(second[0], torch.full((2, 3), 10.0))


def test_outputs_have_the_module_s_dtypes_and_are_contiguous() -> None:
    runner = make(Doubles(), torch.zeros(1, 2, 3, 3), dtypes=(torch.float64,))
    (result,) = runner([torch.ones(1, 2, 3, 3)])
    assert result.dtype is torch.float64
    assert result.is_contiguous()


def test_inputs_are_cast_into_buffers_of_the_engine_s_dtype_and_layout() -> None:
    engine = Doubles()
    runner = make(engine, torch.zeros(1, 2, 3, 3, dtype=torch.float16), dtypes=(torch.float16,))
    x = torch.rand(1, 3, 3, 2, dtype=torch.float64).permute(0, 3, 1, 2)
    (result,) = runner([x])
    assert torch.equal(result, (x.half() * 2))
    assert engine.seen == [torch.zeros(1, 2, 3, 3).to(memory_format=torch.channels_last).stride()]


def test_the_caller_s_input_is_not_kept() -> None:
    runner = make(Doubles(), torch.zeros(2))
    x = torch.ones(2)
    (result,) = runner([x])
    x.fill_(9)
    runner.replay()
    assert result.tolist() == [2.0, 2.0]
    assert runner.check([x])[0].tolist() == [18.0, 18.0]


def test_a_check_counts_as_no_call() -> None:
    runner = make(Doubles(), torch.zeros(2))
    runner.check([torch.ones(2)])
    runner.replay()
    assert (runner.record.calls, runner.pool.calls) == (0, 0)
    runner([torch.ones(2)])
    assert (runner.record.calls, runner.pool.calls) == (1, 1)


def test_without_a_gpu_there_is_no_graph_and_the_record_says_why() -> None:
    runner = make(Doubles(), torch.zeros(2))
    assert runner.record.signature == "a signature"
    assert not runner.record.graph
    assert "GPU" in runner.record.why_no_graph
    assert runner.record.device_mib == 0
    assert runner.engine_bytes() == 0


def test_an_engine_whose_kernels_overlap_is_refused_without_a_graph() -> None:
    engine = Doubles()
    engine.graph_only = True
    with pytest.raises(BuildError, match=r"in a CUDA graph alone.* There is none: CUDA graphs need a GPU\."):
        make(engine, torch.zeros(2))


def test_calls_in_inference_mode_leave_buffers_that_later_calls_can_fill() -> None:
    engine = NativeEngine(lambda x: (x * 2,), PRECISIONS["fp32"])
    with torch.inference_mode():
        runner = make(engine, torch.zeros(2))
        runner([torch.ones(2)])
    assert runner([torch.ones(2)])[0].tolist() == [2.0, 2.0]


def test_runners_of_one_pool_take_turns() -> None:
    engine, pool = Doubles(), Pool(CPU)
    runners = [make(engine, torch.zeros(4), pool=pool) for _ in range(2)]
    wrong: list[float] = []

    def work(index: int) -> None:
        for value in range(20):
            number = float(index * 100 + value)
            (result,) = runners[index % 2]([torch.full((4,), number)])
            if not torch.equal(result, torch.full((4,), number * 2)):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []
    assert engine.inside == 0
    assert pool.calls == 80


def test_a_turn_is_given_back_after_an_exception() -> None:
    class Fails(Engine):
        def __call__(self, *inputs: torch.Tensor) -> tuple[torch.Tensor, ...]:
            raise ValueError("broken")

    pool = Pool(CPU)
    runner = make(Fails(), torch.zeros(1), pool=pool)
    with pytest.raises(ValueError, match="broken"):
        runner([torch.zeros(1)])
    got: list[Any] = []
    thread = threading.Thread(target=lambda: got.append(make(Doubles(), torch.zeros(1), pool=pool)([torch.ones(1)])))
    thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert got[0][0].item() == 2


def test_a_call_with_too_few_tensors_is_an_error() -> None:
    with pytest.raises(ValueError, match="zip"):
        make(Doubles(), torch.zeros(1), torch.zeros(1))([torch.zeros(1)])


@pytest.mark.parametrize(("name", "keep_fp32"), [("fp32", ()), ("fp16", ()), ("fp16", ("fc",))])
def test_a_native_engine_forbids_tf32_only_where_it_matters_and_restores_it(
    name: str, keep_fp32: tuple[str, ...]
) -> None:
    seen: list[Any] = []

    def run(x: torch.Tensor) -> tuple[torch.Tensor]:
        seen.append(torch.backends.cudnn.allow_tf32)
        return (x + 1,)

    before = torch.backends.cudnn.allow_tf32
    assert before is True, "PyTorch's default"
    program = captured(small_conv_net(), images(), precision=name, keep_fp32=keep_fp32)
    (result,) = NativeEngine(run, PRECISIONS[name], program)(torch.zeros(1))
    assert result.item() == 1
    assert seen == [name != "fp32" and not keep_fp32]
    assert torch.backends.cudnn.allow_tf32 is before


def test_a_native_engine_of_a_module_returns_a_tuple() -> None:
    module = nn.Linear(2, 2)
    (result,) = NativeEngine(lambda x: [module(x)], PRECISIONS["fp32"])(torch.ones(1, 2))
    assert not result.requires_grad
