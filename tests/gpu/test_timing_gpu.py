"""The GPU's clock: events against the host's clock, launches that bound, and a host that runs ahead."""

import statistics
import time

import pytest
import torch

from torchaccel.errors import MeasurementWarning
from torchaccel.timing import compare, measure

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU, and PyTorch sees none"),
    # A GPU that is shared, or hot, changes its clocks: these tests are of what is measured, not of how steadily.
    pytest.mark.filterwarnings("ignore:The time wandered"),
]
CYCLES = 2_000_000  # about a millisecond


@pytest.fixture(autouse=True)
def _cuda_is_in_use():
    """What makes `measure` take the GPU's clock by itself; `torch.cuda._sleep`, unlike operators, does not say so."""
    torch.cuda.init()


def spin(factor=1):
    torch.cuda._sleep(int(factor * CYCLES))


def host_clock_ms(call, count=30):
    times = []
    for _ in range(count):
        torch.cuda.synchronize()
        started = time.perf_counter()
        call()
        torch.cuda.synchronize()
        times.append(1000 * (time.perf_counter() - started))
    return statistics.median(times)


def tiny_kernels(count=40):
    x = torch.zeros(1, device="cuda")

    def run():
        for _ in range(count):
            x.add_(1)

    return run


def test_events_agree_with_the_clock_of_the_host():
    measure(spin)  # the clocks go up
    result = measure(spin)
    assert result.device == f"cuda:{torch.cuda.current_device()}"
    assert result.median_ms == pytest.approx(host_clock_ms(spin), rel=0.1, abs=0.05)
    assert not result.launch_bound


def test_twice_the_work_takes_twice_the_time():
    result = compare({"once": spin, "twice": lambda: spin(2)})
    ratio = result.ratio("twice")
    assert 1.9 < ratio.low <= ratio.value <= ratio.high < 2.1
    assert result.fastest == "once"


def test_launches_that_bound_the_gpu_are_said_and_a_graph_of_them_is_not():
    run = tiny_kernels()
    with pytest.warns(MeasurementWarning, match="The GPU waited for the host"):
        launched = measure(run)
    assert launched.launch_bound
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    replayed = measure(graph.replay)
    assert not replayed.launch_bound
    assert replayed.median_ms < launched.median_ms


def test_launches_do_not_hide_behind_another_candidate():
    with pytest.warns(MeasurementWarning, match="The GPU waited for the host"):
        alone = measure(tiny_kernels())
    with pytest.warns(MeasurementWarning, match="The GPU waited for the host .launches"):
        result = compare({"spin": lambda: spin(5), "launches": tiny_kernels()})
    assert result.timings["launches"].launch_bound
    assert not result.timings["spin"].launch_bound
    assert result.timings["launches"].median_ms == pytest.approx(alone.median_ms, rel=0.5)


def test_the_host_never_waits_between_samples():
    called = []

    def call():
        called.append(time.perf_counter())
        spin()

    result = measure(call, samples=100, warmup=10)
    launching_ms = 1000 * (called[-1] - called[-100])
    assert launching_ms < 0.5 * sum(result.samples)


def test_a_function_that_waits_is_bound_by_the_host():
    def call():
        spin()
        torch.cuda.synchronize()

    with pytest.warns(MeasurementWarning, match="The GPU waited for the host"):
        result = measure(call)
    assert result.median_ms == pytest.approx(host_clock_ms(spin), rel=0.2, abs=0.05)


def test_the_current_stream_is_the_one_that_is_measured():
    with torch.cuda.stream(torch.cuda.Stream()):
        aside = measure(spin)
    assert aside.median_ms == pytest.approx(measure(spin).median_ms, rel=0.1, abs=0.05)


def test_tensors_on_the_gpu_choose_its_clock_and_the_cpu_can_be_asked_for():
    x = torch.ones(2048, 2048, device="cuda")
    assert measure(torch.mm, x, x).device.startswith("cuda")
    assert measure(sum, range(10_000), device="cpu").device == "cpu"
