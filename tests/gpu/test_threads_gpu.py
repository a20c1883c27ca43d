"""Many threads on streams of their own: results equal to serial ones, each from one refresh, and no waiting."""

import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest
import torch

import torchaccel
from tests.gpu.helpers import need
from tests.models import small_conv_net

THREADS = 16
CALLS = 2000
BATCHES = (1, 2, 3, 5)


def images(batch: int) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(batch)
    return torch.randn(batch, 3, 32, 32, device="cuda", generator=generator)


@contextmanager
def no_synchronisation() -> Iterator[None]:
    """Let every call raise that waits on the host for the device."""
    with warnings.catch_warnings():  # PyTorch warns that the mode may miss some
        warnings.simplefilter("ignore", UserWarning)
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def in_threads(work: Callable[[int], None], count: int = THREADS) -> None:
    """Run `work(number)` in as many threads, each on a stream of its own, and raise what one of them raised."""
    errors: list[BaseException] = []

    def run(number: int) -> None:
        try:
            with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
                work(number)
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def serial(model: torch.nn.Module, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    with torch.inference_mode():
        results = [model(x) for x in inputs]
    torch.cuda.synchronize()
    return results


@pytest.mark.parametrize("backend", ["onnx_tensorrt", "eager"])
def test_every_result_equals_the_serial_one_and_no_call_waits(backend: str) -> None:
    need(backend)
    model = torchaccel.compile(small_conv_net().cuda(), "fp16", backend=backend)
    inputs = [images(batch) for batch in BATCHES]
    expected = serial(model, inputs)
    wrong = [torch.zeros((), dtype=torch.bool, device="cuda") for _ in range(THREADS)]
    torch.cuda.synchronize()

    def work(number: int) -> None:
        for turn in range(CALLS):
            index = (number + turn) % len(inputs)
            wrong[number] |= (model(inputs[index]) != expected[index]).any()

    with no_synchronisation():
        in_threads(work)
    torch.cuda.synchronize()
    assert not any(bool(flag) for flag in wrong)
    report = model.report()
    assert (report.builds, report.refreshes, report.calls_by_module) == (len(inputs), 0, 0)
    assert report.calls_by_engine == THREADS * CALLS + len(inputs)
    assert all(runner.graph for runner in report.runners)


def test_with_refreshes_between_each_result_is_of_exactly_one() -> None:
    need("eager")
    module = small_conv_net().cuda()
    model = torchaccel.compile(module, "fp16", backend="eager", on_weight_change="ignore")
    inputs = [images(batch) for batch in BATCHES]
    states = []
    generator = torch.Generator("cuda").manual_seed(0)
    for _ in range(8):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(torch.randn(parameter.shape, device="cuda", generator=generator) * 0.1)
        states.append([parameter.detach().clone() for parameter in module.parameters()])
    answers = []
    for state in states:
        with torch.no_grad():
            torch._foreach_copy_(list(module.parameters()), state)
        model.refresh()
        answers.append(serial(model, inputs))
    known = [torch.stack([answer[index] for answer in answers]) for index in range(len(inputs))]
    assert all(not torch.equal(known[0][0], other) for other in known[0][1:])
    wrong = [torch.zeros((), dtype=torch.bool, device="cuda") for _ in range(THREADS)]
    seen = torch.zeros(len(states), dtype=torch.bool, device="cuda")
    done = threading.Event()
    torch.cuda.synchronize()
    refreshed = 0

    def refresh() -> None:
        nonlocal refreshed
        with torch.inference_mode(False), torch.no_grad():
            while not done.is_set():
                torch._foreach_copy_(list(module.parameters()), states[refreshed % len(states)])
                model.refresh()
                refreshed += 1
                time.sleep(0.001)

    def work(number: int) -> None:
        if number == THREADS:
            return refresh()
        try:
            for turn in range(CALLS):
                index = (number + turn) % len(inputs)
                matches = (model(inputs[index]) == known[index]).flatten(1).all(1)
                wrong[number] |= ~matches.any()
                if not number:
                    seen.logical_or_(matches)
        finally:
            if number == 0:
                done.set()
        return None

    with no_synchronisation():
        in_threads(work, THREADS + 1)
    torch.cuda.synchronize()
    assert not any(bool(flag) for flag in wrong)
    assert refreshed > 5
    assert seen.sum() > 1
    assert all(runner.graph for runner in model.report().runners)


@pytest.mark.parametrize("backend", ["onnx_tensorrt", "eager"])
def test_calls_return_while_a_long_kernel_before_them_still_runs(backend: str) -> None:
    need(backend)
    model = torchaccel.compile(small_conv_net().cuda(), "fp16", backend=backend)
    inputs = [images(batch) for batch in BATCHES]
    serial(model, inputs)
    ended: list[torch.cuda.Event] = []
    still_running: list[bool] = []

    def work(number: int) -> None:
        torch.cuda._sleep(2_000_000_000)  # about a second
        event = torch.cuda.Event()
        event.record()
        ended.append(event)
        for x in inputs:
            model(x)
        still_running.append(not event.query())

    with no_synchronisation():
        in_threads(work)
    assert still_running == [True] * THREADS
    torch.cuda.synchronize()


def test_a_pinning_loader_runs_beside_captures() -> None:
    need("eager")
    module = small_conv_net().cuda()
    model = torchaccel.compile(module, "fp16", backend="eager", max_runners=4)
    data = torch.utils.data.TensorDataset(torch.randn(4000, 3, 32, 32))
    stop = threading.Event()
    read = 0

    def load() -> None:
        nonlocal read
        while not stop.is_set():
            for (x,) in torch.utils.data.DataLoader(data, batch_size=100, pin_memory=True):
                assert x.is_pinned()
                x.cuda(non_blocking=True)
                read += 1
                if stop.is_set():
                    break

    thread = threading.Thread(target=load)
    thread.start()
    try:
        with torch.inference_mode():
            for batch in (*range(1, 9), *range(1, 9)):
                x = images(batch)
                got, wanted = model(x).double(), module(x).double()
                assert (got - wanted).norm() <= 1e-2 * wanted.norm()
    finally:
        stop.set()
        thread.join()
    assert read > 5
    assert all(runner.graph for runner in model.report().runners), model.report().runners


@pytest.mark.parametrize("backend", ["onnx_tensorrt", "eager"])
def test_inputs_freed_at_once_under_allocator_pressure(backend: str) -> None:
    need(backend)
    model = torchaccel.compile(small_conv_net().cuda(), "fp16", backend=backend)
    batches = [images(batch) for batch in (64, 65)]
    expected = serial(model, batches)
    results = []
    with torch.inference_mode():
        for turn in range(50):
            torch.cuda._sleep(1_000_000)
            results.append(model(batches[turn % 2].clone()))  # the only reference dies here
            for _ in range(4):  # takes the memory again, and writes it
                torch.full((64 + turn % 2, 3, 32, 32), float("nan"), device="cuda")
    torch.cuda.synchronize()
    for turn, result in enumerate(results):
        assert torch.equal(result, expected[turn % 2])
