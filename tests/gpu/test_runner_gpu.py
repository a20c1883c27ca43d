"""The runner on the GPU: order in both directions, outputs of the caller's own, no waiting, graphs that fail."""

import threading
import time
import warnings

import pytest
import torch

import torchaccel
from tests.gpu.helpers import ALL, TENSORRT, need, relative_error, served_by_engine, warned_of_overlap
from tests.models import small_conv_net
from torchaccel.runner import Runner


def make(backend: str = "eager", **options: object) -> tuple[torch.nn.Module, torchaccel.CompiledModule]:
    need(backend)
    module = small_conv_net().cuda()
    return module, torchaccel.compile(module, "fp16", backend=backend, **options)


def images(batch: int = 4, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.randn(batch, 3, 32, 32, device="cuda", generator=generator)


@pytest.mark.parametrize("graph", [True, False])
@pytest.mark.parametrize("backend", ALL)
def test_a_later_call_never_changes_an_earlier_result(backend: str, graph: bool) -> None:
    module, model = make(backend, cuda_graph=graph)
    with torch.inference_mode():
        with warned_of_overlap(backend, graph):
            first = model(images(seed=1))
        kept = first.clone()
        model(images(seed=2))
        assert torch.equal(first, kept)
        assert relative_error(first, module(images(seed=1))) < 1e-2
    assert model.report().to_dict()["graph"] == (True if graph else "cuda_graph=False")


@pytest.mark.parametrize("backend", ALL)
def test_a_call_is_ordered_after_the_producer_and_before_the_consumer(backend: str) -> None:
    module, model = make(backend)
    with torch.inference_mode():
        model(images())
        torch.cuda.synchronize()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            late = torch.zeros(4, 3, 32, 32, device="cuda")
            torch.cuda._sleep(200_000_000)  # about 0.1 s: the input is written long after the call was enqueued
            late.copy_(images(seed=3))
            result = model(late)
            late.zero_()  # freed and overwritten at once: the call must have read it before
            doubled = result * 2
        stream.synchronize()
        assert relative_error(result, module(images(seed=3))) < 1e-2
        assert torch.equal(doubled, result * 2)


def test_taking_the_order_out_breaks_the_result(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test above can fail: with the calls of two streams unordered, one overwrites the other's buffers."""
    _, model = make()
    with torch.inference_mode():
        expected = [model(images(256, seed)) for seed in (1, 2)]
        torch.cuda.synchronize()

        def race() -> bool:
            slow, fast = torch.cuda.Stream(), torch.cuda.Stream()
            inputs = [images(256, seed) for seed in (1, 2)]
            torch.cuda.synchronize()
            runner = model.runner_for(inputs[0])
            copy_in = Runner.load_inputs

            def slow_copy(self: Runner, tensors: object) -> None:
                copy_in(self, tensors)  # type: ignore[arg-type]
                if torch.cuda.current_stream() == slow:
                    torch.cuda._sleep(100_000_000)  # between the copy in and the replay

            monkeypatch.setattr(Runner, "load_inputs", slow_copy)
            with torch.cuda.stream(slow):
                first = runner([inputs[0]])[0]
            with torch.cuda.stream(fast):
                second = runner([inputs[1]])[0]
            torch.cuda.synchronize()
            monkeypatch.setattr(Runner, "load_inputs", copy_in)
            return torch.equal(first, expected[0]) and torch.equal(second, expected[1])

        assert race()
        monkeypatch.setattr(torch.cuda.Stream, "wait_event", lambda *_: None)
        assert not race()


@pytest.mark.parametrize("backend", ALL)
def test_a_warm_call_never_waits_for_the_device(backend: str) -> None:
    _, model = make(backend)
    x = images()
    with torch.inference_mode():
        model(x)
        torch.cuda.synchronize()
        try:
            with warnings.catch_warnings():  # PyTorch warns that the mode may miss some
                warnings.simplefilter("ignore", UserWarning)
                torch.cuda.set_sync_debug_mode("error")
            torch.cuda._sleep(1_000_000_000)  # about half a second
            started = time.perf_counter()
            model(x)
            took = time.perf_counter() - started
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
    assert took < 0.1


@pytest.mark.parametrize("backend", ALL)
def test_cpu_in_cpu_out(backend: str) -> None:
    module, model = make(backend)
    with torch.inference_mode():
        for x in (images().cpu(), images(seed=5).cpu().pin_memory()):
            result = model(x)
            assert result.device.type == "cpu"
            assert relative_error(result, module(x.cuda()).cpu()) < 1e-2


@pytest.mark.parametrize("backend", TENSORRT)
def test_a_module_on_the_cpu_is_moved_in_place(backend: str) -> None:
    need(backend)
    module = small_conv_net()
    weight = module.fc.weight
    model = torchaccel.compile(module, "fp16", backend=backend)
    assert module.fc.weight is weight
    assert weight.device.type == "cuda"
    with torch.inference_mode():
        assert model(images().cpu()).device.type == "cpu"


def test_a_failed_capture_leaves_the_engine_the_generator_and_the_allocator_usable() -> None:
    class Waits(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x * wait(x)

    model = torchaccel.compile(Waits(), "fp16", backend="eager", device="cuda")
    x = torch.ones(8, device="cuda")
    with torch.inference_mode():
        assert torch.equal(model(x), x)
        reason = model.report().to_dict()["graph"]
        assert "cannot be captured" in str(reason)
        assert served_by_engine(model)
        torch.randn(8, device="cuda")  # a generator left in capture mode would refuse
        _, other = make()
        other(images())
        assert other.report().to_dict()["graph"] is True
        side = torch.cuda.Stream()
        torch.cuda.synchronize()
        before = torch.cuda.memory_reserved()
        for _ in range(8):  # an allocator that takes a capture for still under way never reuses these
            block = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
            block.record_stream(side)
            del block
            torch.cuda.synchronize()
        assert torch.cuda.memory_reserved() - before <= 2 << 28


@torch.library.custom_op("torchaccel_tests::wait", mutates_args=())
def wait(x: torch.Tensor) -> torch.Tensor:
    """Ones like x, after waiting for the device, which no graph can capture."""
    torch.cuda.synchronize()
    return torch.ones_like(x)


@wait.register_fake
def _(x: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(x)


@pytest.mark.parametrize("backend", ["onnx_tensorrt", "eager"])
def test_threads_on_their_own_streams_get_the_serial_results(backend: str) -> None:
    _, model = make(backend)
    inputs = [images(batch, seed) for seed in range(4) for batch in (1, 2, 3)]
    with torch.inference_mode():
        serial = [model(x) for x in inputs]
    torch.cuda.synchronize()
    wrong: list[int] = []

    def work(offset: int) -> None:
        with torch.inference_mode(), torch.cuda.stream(torch.cuda.Stream()):
            for turn in range(100):
                index = (offset + turn) % len(inputs)
                if not torch.equal(model(inputs[index]), serial[index]):
                    wrong.append(index)

    threads = [threading.Thread(target=work, args=(offset,)) for offset in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_runners_beyond_the_limit_go_and_come_back_without_a_build() -> None:
    _, model = make("onnx_tensorrt", max_runners=2)
    with torch.inference_mode():
        for batch in (1, 2, 3, 1, 2, 3):
            model(images(batch))
    assert model.report().builds == 3
    assert len(model.report().runners) == 2


@pytest.mark.parametrize("bias", [True, False], ids=["cuBLASLt", "cuBLAS"])
def test_a_graph_reads_no_workspace_of_cublas_that_others_may_clear(bias: bool) -> None:
    """torch.compile's graphs clear them all: what the warm-up's was is then anybody's memory."""
    module = torch.nn.Linear(16384, 64, bias=bias).cuda()  # a long sum, which is split over the workspace
    model = torchaccel.compile(module, "fp16", backend="eager")
    x = torch.randn(64, 16384, device="cuda")
    with torch.inference_mode():
        expected = model(x)
        torch._C._cuda_clearCublasWorkspaces()
        with torch.cuda.stream(model.runner_for(x).pool.capture_stream):
            others = [torch.zeros(mib << 20, dtype=torch.uint8, device="cuda") for mib in (32, 32, 1, 1)]
        torch.cuda.synchronize()
        assert torch.equal(model(x), expected)
        assert not any(other.any() for other in others)
